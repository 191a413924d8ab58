"""One mutant: drawn from a seed, run as it is and as attnopt makes it, and the two compared in fp64, gradients too."""

import copy
import random
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mutants_more  # noqa: F401 - more operators
import torch
from mutant_programs import graph_of, guards_of, inputs_of, programs, resized
from mutants import OPERATORS, NoPlace, mutate
from torch import Tensor
from torch.fx import GraphModule

from attnopt.backend import attnopt, reports

#: Relative error of a row: in fp64, and where the mutant itself works in single or half precision.
EXACT, SINGLE, HALF = 1e-7, 1e-3, 5e-2
#: Errors that say that a mutant is no program.
NO_PROGRAM = (NoPlace, RuntimeError, IndexError, TypeError, ValueError, NotImplementedError, AttributeError)
#: What autograd says when a tensor that it needs was written to.
_WRITTEN = "modified by an inplace operation"
#: How often one seed draws until a mutant runs and differs from its program; the last one that ran is taken else.
DRAWS = 8


@dataclass(frozen=True)
class Setting:
    """free: symbolic sizes. training: gradients are compared. kernels: those that may serve, () for any."""

    free: bool = False
    training: bool = False
    kernels: tuple[str, ...] = ()


@dataclass
class Trial:
    """What became of one seed. drawn: "operator outcome" -> count, with outcome broken, same or differs.

    differs: None if no mutant of this seed ran. wrong: what was wrong, "" for nothing.
    """

    seed: int
    name: str
    setting: Setting
    operators: tuple[str, ...] = ()
    differs: bool | None = None
    verdicts: tuple[str, ...] = ()
    wrong: str = ""
    drawn: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Outcome:
    """Results of a run; gradients of the floating-point inputs, None where there is none."""

    results: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...] = ()


def trial(seed: int, names: Sequence[str] = ()) -> Trial:
    """Draws a program, a setting and a mutant of it, and checks what attnopt makes of that."""
    name = random.Random(f"name {seed}").choice(list(names) or sorted(programs()))  # noqa: S311 - no secrets here
    rng = random.Random(f"{name} {seed}")  # noqa: S311 - the same mutant, whatever other programs there are
    kernels = rng.choice([(), (), ("streaming",), ("lightning",) if "linear" in name else ("sdpa",)])
    setting = Setting(rng.random() < 0.35, rng.random() < 0.5, kernels)
    found = Trial(seed, name, setting)
    mutant = _draw(found, rng)
    if mutant is not None:
        _judge(found, *mutant)
    return found


def _draw(found: Trial, rng: random.Random) -> tuple[GraphModule, Outcome] | None:
    inputs = inputs_of(found.name)
    try:
        original = graph_of(found.name, free=found.setting.free)
        plain = run(copy.deepcopy(original), inputs, training=False)
    except (*NO_PROGRAM, AssertionError):
        return None  # it cannot be traced so, or not run in fp64
    last = None
    for _ in range(DRAWS):
        operators = tuple(rng.choices(sorted(OPERATORS), k=rng.choice([1, 1, 1, 1, 2, 3])))
        mutant = copy.deepcopy(original)
        try:
            for operator in operators:
                mutate(mutant, operator, rng.randrange)
            outcome = run(copy.deepcopy(mutant), inputs, training=found.setting.training)
        except NO_PROGRAM as problem:
            found.drawn[f"{operators[0]} {'no place' if isinstance(problem, NoPlace) else 'broken'}"] += 1
            continue
        differs = bool(_difference(outcome.results, plain.results, EXACT))
        if len(operators) == 1:
            found.drawn[f"{operators[0]} {'differs' if differs else 'same'}"] += 1
        found.operators, found.differs = operators, differs
        last = mutant, outcome
        if differs:
            break
    return last


def _judge(found: Trial, mutant: GraphModule, wanted: Outcome) -> None:
    """Fills in what attnopt made of the mutant."""
    setting, inputs = found.setting, inputs_of(found.name)
    tolerance, before, plain = precision(mutant), guards_of(mutant), copy.deepcopy(mutant)
    options = {"inner": "eager", "allow": setting.kernels}
    with warnings.catch_warnings(), torch.set_grad_enabled(setting.training):
        warnings.simplefilter("ignore")
        made = attnopt(mutant, list(inputs), options=options)
    report = reports()[-1]
    found.verdicts = tuple(f"{site.family} {site.verdict}" for site in report.sites)
    found.wrong = "; ".join(report.warnings) or _compare(made, wanted, inputs, tolerance, setting)
    if _WRITTEN in found.wrong:
        # Plain autograd forbids to write to what a call has saved; AOTAutograd, which users run, takes the writes out.
        roots = [
            x.clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in inputs
        ]
        functional = attnopt(copy.deepcopy(plain), roots, options={**options, "inner": "aot_eager"})
        found.wrong = _compare(functional, wanted, inputs, tolerance, setting)
    if guards_of(mutant) != before:
        graph_of.cache_clear()  # symbols are shared by all mutants of a program
    elif setting.free and not found.wrong:
        found.wrong = _at_other_sizes(made, plain, found, tolerance)


def _at_other_sizes(made: Any, plain: GraphModule, found: Trial, tolerance: float) -> str:
    inputs = resized(found.name)
    try:
        wanted = run(plain, inputs, training=found.setting.training)
    except NO_PROGRAM:
        return ""
    wrong = _compare(made, wanted, inputs, tolerance, found.setting)
    return wrong and f"at other sizes: {wrong}"


def _compare(made: Any, wanted: Outcome, inputs: Sequence[Any], tolerance: float, setting: Setting) -> str:
    try:
        got = run(made, inputs, training=setting.training)
    except NO_PROGRAM as problem:
        return f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
    return _difference(got.results, wanted.results, tolerance) or _off_gradients(got, wanted, tolerance)


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


def _difference(got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> str:
    """What differs in the results, "" for nothing."""
    if len(got) != len(wanted):
        return f"{len(got)} results, wanted {len(wanted)}"
    for number, (out, want) in enumerate(zip(got, wanted, strict=True)):
        if (out.dtype, out.shape) != (want.dtype, want.shape):
            return (
                f"result {number} is {out.dtype} {tuple(out.shape)}, wanted {want.dtype} {tuple(want.shape)}"
            )
        if not torch.equal(out.isnan(), want.isnan()):
            return f"result {number}: {int(out.isnan().sum())} NaN, wanted {int(want.isnan().sum())}"
        if not torch.equal(out.isinf(), want.isinf()):
            return f"result {number}: {int(out.isinf().sum())} Inf, wanted {int(want.isinf().sum())}"
        if (error := _row_error(out, want)) > tolerance:
            return f"result {number}: a row is off by {error:.1e}"
    return ""


def _off_gradients(got: Outcome, wanted: Outcome, tolerance: float) -> str:
    """What differs in the gradients. Where eager's is NaN (0 / 0 in a row without keys) any number will do."""
    for number, (out, want) in enumerate(zip(got.gradients, wanted.gradients, strict=True)):
        if out is None or want is None:
            known = next((x for x in (out, want) if x is not None), torch.zeros(1))
            if float(known.nan_to_num(0, 0, 0).abs().max()) > 0:
                return f"gradient {number} is {'missing' if out is None else 'not None'}"
            continue
        there = want.isfinite()
        if not bool(out[there].isfinite().all()):
            return f"gradient {number} is not finite"
        if (error := _row_error(out.where(there, 0.0), want.where(there, 0.0), 1e-5)) > 10 * tolerance:
            return f"gradient {number}: a row is off by {error:.1e}"
    return ""


def _row_error(out: Tensor, want: Tensor, least: float = 1e-9) -> float:
    """The largest error of a row, relative to the row, or to a thousandth of the largest row, or to `least`.

    Gradients of softmax attention are differences, and may cancel down to nothing.
    """
    if out.numel() == 0:
        return 0.0
    a, b = (torch.atleast_1d(x.double().nan_to_num(0.0, 0.0, 0.0)) for x in (out, want))
    size = b.norm(dim=-1)
    return float(((a - b).norm(dim=-1) / size.clamp_min(1e-3 * float(size.max())).clamp_min(least)).max())
