"""What a graph gives, and whether two graphs give the same: results row by row, gradients, NaN for NaN."""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mutant_infinities import STRICT, Beyond, differing, in_double, recovered, without_half
from mutant_noise import Shaken
from mutants import NoPlace
from torch import Tensor
from torch.fx import GraphModule

#: Relative error of a row: in fp64, and where the mutant itself works in single or half precision.
EXACT, SINGLE, HALF = 1e-7, 1e-3, 5e-2
#: Errors that say that a mutant is no program.
NO_PROGRAM = (NoPlace, RuntimeError, IndexError, TypeError, ValueError, NotImplementedError, AttributeError)
#: How often a graph is computed anew to learn how well its results are known.
SHAKES = 12
#: Least size of a row that errors are relative to, of results and of gradients.
LEAST, LEAST_GRADIENT = 1e-9, 1e-5


@dataclass(frozen=True)
class Outcome:
    """Results of a run; gradients of the floating-point inputs, None where there is none."""

    results: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...] = ()


@dataclass(frozen=True)
class Noise:
    """What eager's own rounding changes: the largest error of a row of each result and gradient; inf: what is NaN."""

    results: tuple[float, ...]
    gradients: tuple[float, ...]


def apart(graph: GraphModule) -> GraphModule:
    """The graph itself, or a copy of it if it holds tensors, to which a run may write."""
    return copy.deepcopy(graph) if any(n.op == "get_attr" for n in graph.graph.nodes) else graph


@contextmanager
def sealed() -> Iterator[None]:
    """Autocast that a graph switches on, and does not switch off (it is a mutant, or raised an error), ends here.

    Whatever the process runs later would be computed in half precision, unasked.
    """
    with torch.autocast("cpu", enabled=False):
        yield


@sealed()
def run(graph: Any, inputs: Sequence[Any], *, training: bool) -> Outcome:
    """One call on copies of the inputs; when training, a backward pass through all that is floating point."""
    torch.manual_seed(0)
    held = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    roots = [x for x in held if isinstance(x, Tensor) and x.is_floating_point()] if training else []
    for root in roots:
        root.requires_grad_()
    given = [x * 1 if any(x is r for r in roots) else x for x in held]  # so that a graph may write to them
    with torch.set_grad_enabled(training):
        results = tuple(graph(*given))
    tracked = [x for x in results if isinstance(x, Tensor) and x.requires_grad]
    if not tracked:
        return Outcome(tuple(x.detach() for x in results), (None,) * len(roots))
    weights = [
        torch.linspace(0.5, 1.5, x.numel(), dtype=torch.float64).view(x.shape).to(x.dtype) for x in tracked
    ]
    gradients = torch.autograd.grad(tracked, roots, weights, allow_unused=True)
    return Outcome(tuple(x.detach() for x in results), tuple(gradients))


def precision(module: GraphModule) -> float:
    """The error that the narrowest type in the graph allows."""
    made = {x.dtype for n in module.graph.nodes if isinstance(x := n.meta.get("val"), Tensor)}
    written = " ".join(f"{node.args} {node.kwargs}" for node in module.graph.nodes)
    if made & {torch.bfloat16, torch.float16} or re.search("float16", written):
        return HALF
    return SINGLE if torch.float32 in made or "float32" in written else EXACT


def compare(
    made: Any,
    wanted: Outcome,
    inputs: Sequence[Any],
    tolerance: float,
    noise: Noise | None = None,
    beyond: Beyond = STRICT,
    *,
    training: bool,
) -> str:
    """What `made` gives otherwise than `wanted`, "" for nothing. noise: what eager's own rounding changes.

    beyond: what may stand where eager is not finite.
    """
    try:
        got = run(made, inputs, training=training)
    except NO_PROGRAM as problem:
        return f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
    lost = noise or Noise((0.0,) * len(wanted.results), (0.0,) * len(wanted.gradients))
    results = [max(tolerance, 2 * x) for x in lost.results]
    gradients = [max(10 * tolerance, 3 * x) for x in lost.gradients]
    differs = difference(got.results, wanted.results, results, beyond)
    return differs or _off_gradients(got, wanted, gradients)


def beyond_of(plain: GraphModule, inputs: Sequence[Any], *, linear: bool) -> Beyond:
    """What may stand where eager is not finite; `wide` is empty where the program does not run in fp64 throughout."""
    wider = without_half(plain) if linear else apart(plain)
    try:
        with in_double():
            return Beyond(linear, run(wider, inputs, training=False).results)
    except NO_PROGRAM:
        return Beyond(linear)


def noise_of(plain: GraphModule, wanted: Outcome, inputs: Sequence[Any], *, training: bool) -> Noise:
    """How much the results change when each operation rounds otherwise than it did."""
    shaken = []
    for seed in range(SHAKES):
        with Shaken(seed):
            shaken.append(run(apart(plain), inputs, training=training))
    results = [[_change(a, b, LEAST) for a, b in zip(s.results, wanted.results, strict=True)] for s in shaken]
    gradients = [
        [_change(a, b, LEAST_GRADIENT) for a, b in zip(s.gradients, wanted.gradients, strict=True)]
        for s in shaken
    ]
    return Noise(tuple(map(max, zip(*results, strict=True))), tuple(map(max, zip(*gradients, strict=True))))


def _change(out: Tensor | None, want: Tensor | None, least: float) -> float:
    if out is None or want is None:
        return 0.0
    same = torch.equal(out.isnan(), want.isnan()) and torch.equal(out.isinf(), want.isinf())
    return _row_error(out, want, least) if same else float("inf")


def difference(
    got: Sequence[Tensor], wanted: Sequence[Tensor], allowed: Sequence[float], beyond: Beyond = STRICT
) -> str:
    """What differs in the results, "" for nothing. allowed: for each the relative error of a row."""
    if len(got) != len(wanted):
        return f"{len(got)} results, wanted {len(wanted)}"
    for number, (out, want, most) in enumerate(zip(got, wanted, allowed, strict=False)):
        if (out.dtype, out.shape) != (want.dtype, want.shape):
            return (
                f"result {number} is {out.dtype} {tuple(out.shape)}, wanted {want.dtype} {tuple(want.shape)}"
            )
        if most == float("inf"):
            continue
        if infinities := differing(out, want, number, beyond):
            return infinities
        known = want.isfinite()
        errors = _row_error(out.where(known, 0.0), want), _row_error(*recovered(out, want, number, beyond))
        if (error := max(errors)) > most:
            return f"result {number}: a row is off by {error:.1e}"
    return ""


def _off_gradients(got: Outcome, wanted: Outcome, allowed: Sequence[float]) -> str:
    """What differs in the gradients. Where eager's is NaN (0 / 0 in a row without keys) any number will do.

    A gradient of zeros is no missing one: optimisers and DDP tell the two apart.
    """
    for number, (out, want, most) in enumerate(zip(got.gradients, wanted.gradients, allowed, strict=True)):
        if out is None or want is None:
            if out is None and want is not None:
                return f"gradient {number} is missing"
            if out is not None and float(out.nan_to_num(0, 0, 0).abs().max()) > 0:
                return f"gradient {number} is not None"
            continue
        there = want.isfinite()
        if most < float("inf") and not bool(out[there].isfinite().all()):
            return f"gradient {number} is not finite"
        if (error := _row_error(out.where(there, 0.0), want.where(there, 0.0), LEAST_GRADIENT)) > most:
            return f"gradient {number}: a row is off by {error:.1e}"
    return ""


def _row_error(out: Tensor, want: Tensor, least: float = LEAST) -> float:
    """The largest error of a row, relative to the row, or to a thousandth of the largest row, or to `least`.

    Gradients of softmax attention are differences, and may cancel down to nothing.
    """
    if out.numel() == 0:
        return 0.0
    a, b = (torch.atleast_1d(x.double().nan_to_num(0.0, 0.0, 0.0)) for x in (out, want))
    unit = max(1.0, float(b.abs().max()))  # squares must not overflow
    a, b, least = a / unit, b / unit, least / unit
    size = b.norm(dim=-1)
    return float(((a - b).norm(dim=-1) / size.clamp_min(1e-3 * float(size.max())).clamp_min(least)).max())
