"""Translation validation: the site as the graph spells it against what was read, in fp64, on several kinds of values.

The original sub-graph is cut out between the operands and the root and run in fp64; the reading is run by the
reference kernel on the same values. They must agree to 1e-9 in every row, NaN for NaN. Long sequences and large
batches are cut down to small ones where the graph allows it; equal sites cost one check.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.kernels.reference.kernel import KERNEL as REFERENCE
from attnopt.mask import FULL, And, Causal, First, Mask, Or, Window
from attnopt.passes import emit
from attnopt.passes.layout import Axis
from attnopt.passes.replay import Replay, normal_form
from attnopt.passes.site import Operand, Result
from attnopt.passes.site_block import Block
from attnopt.passes.sizes import Concrete, product, seen_symbols
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow

#: Largest relative error of a row, in fp64.
TOLERANCE = 1e-9
#: Most elements of Q K^T that a check at the graph's own sizes may have.
BUDGET = 2**22
#: A window or sink longer than this is not reached by the check at reduced sizes.
LONGEST = 600
SHORT = 11
#: Steepest log decay that a check draws: a graph may compute its inverse above the diagonal, and multiply it by 0.
STEEPEST = 8.0
#: Bound for the scores of which a graph takes exp as they are.
LARGEST = 300.0


@dataclass(frozen=True, slots=True)
class Check:
    """error: the worst relative error of a row (None: could not be run). reason: why it failed or did not run."""

    error: float | None = None
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Whether it ran and every row agreed."""
        return self.error is not None and self.error <= TOLERANCE


Checks = dict[str, Check]


def validate(shadow: Shadow, site: Site, done: Checks) -> Check:
    """Checks one site, or recalls the check of an equal one from `done`."""
    replay = Replay.of(shadow, site)
    key = normal_form(replay, site)
    if key not in done:
        done[key] = _validate(replay, site)
    return done[key]


def _validate(replay: Replay, site: Site) -> Check:
    if site.trial is not None:
        return _try_out(site, site.trial)
    numbers = {*replay.numbers, *_lengths_of(site.spec.mask)}
    check = _attempt(replay, site, _reduced(site, numbers))
    if check.agrees and not _lie_beyond(site, numbers):
        return check
    if _fits(site, Concrete()):
        return _attempt(replay, site, Concrete())
    return (
        check
        if check.agrees or check.error is None
        else replace(check, error=None, reason="too large to check at its own sizes")
    )


def _try_out(site: Site, trial: Callable[[int], tuple[Mapping[Node, Tensor], tuple[Tensor, ...]]]) -> Check:
    """A site that draws its own values, at the graph's own sizes."""
    if not _fits(site, _as_traced(site)):
        return Check(None, "too large to check at its own sizes")
    worst, plain = 0.0, without_casts(site)
    for seed in range(len(FAMILIES)):
        values, expected = trial(seed)
        actual = emit.call_all(plain, site.spec, REFERENCE.run, [values[n] for n in emit.leaves(site)])
        worst = max([worst, *map(row_error, actual, expected)])
        if not worst <= TOLERANCE:
            return Check(worst, f"on random values the reading differs by {worst:.1e} from the graph")
    return Check(worst)


def _attempt(replay: Replay, site: Site, sizes: Concrete) -> Check:
    worst = 0.0
    for family in FAMILIES:
        try:
            error = _compare(replay, site, sizes, family)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, Reject) as problem:
            return Check(None, f"the check could not be run: {str(problem).splitlines()[0]}")
        worst = max(worst, error)
        if not worst <= TOLERANCE:
            return Check(
                worst, f"on {family.__name__} values the reading differs by {worst:.1e} from the graph"
            )
    return Check(worst)


def _compare(replay: Replay, site: Site, sizes: Concrete, family: "Family") -> float:
    given = _lengths(site, sizes)
    values = _values(site, given, family)
    expected = replay.run(values, sizes)
    plain = without_casts(site)
    actual = emit.call(plain, site.spec, REFERENCE.run, [values[node] for node in emit.leaves(site)], given)
    return row_error(actual, expected.double())


def row_error(actual: Tensor, expected: Tensor) -> float:
    """The largest relative error of a row (last dimension); infinite if shapes or special values differ."""
    if actual.shape != expected.shape or not torch.equal(torch.isnan(actual), torch.isnan(expected)):
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    a, b = (torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0) for x in (actual, expected))
    if not torch.equal(*(x.where(torch.isinf(x), 0.0) for x in (actual, expected))):
        return float("inf")
    scale = b.norm(dim=-1).clamp_min(1e-30)
    return float(((a - b).norm(dim=-1) / scale).max())


def without_casts(site: Site) -> Site:
    """The same site computing in whatever dtype its operands have."""
    operands = {name: _widened(o) if isinstance(o, Operand) else o for name, o in site.operands.items()}
    wide = replace(emit.result_of(site), dtype=torch.float64)
    if site.state is None:
        return replace(site, operands=operands, result=wide)
    node, state = site.state
    return replace(
        site, operands=operands, result=wide, state=(node, replace(cast(Result, state), dtype=torch.float64))
    )


def _widened(operand: Operand) -> Operand:
    times, beside = (tuple(map(_widened, parts)) for parts in (operand.times, operand.beside))
    return replace(operand, dtype=None, times=times, beside=beside)


def _as_traced(site: Site) -> Concrete:
    values = (node.meta["val"] for node in (site.root, *emit.leaves(site)))
    return Concrete(symbols=seen_symbols(size for value in values for size in getattr(value, "shape", ())))


def _fits(site: Site, sizes: Concrete) -> bool:
    roles = emit.result_of(site).roles
    axes = (*roles.batch, *roles.heads, *roles.query, *roles.key)
    try:
        return bool(product(sizes.of(a.size) for a in axes) <= BUDGET)
    except ValueError:
        return False  # some size has no value where the others are these numbers


def _reduced(site: Site, numbers: Iterable[int]) -> Concrete:
    """Batches and sequences cut short, wherever the graph writes those numbers, yet beyond its other `numbers`."""
    roles = emit.result_of(site).roles
    short = max([SHORT, *(n + 5 for n in numbers if n <= LONGEST)])
    sizes: dict[int, int] = {}
    sequences = () if _has_blocks(site) else ((roles.query, short), (roles.key, short + 2))
    for axes, small in (*sequences, (roles.batch, 2)):
        for axis in axes:
            if isinstance(axis.size, int) and axis.size > small:
                sizes.setdefault(axis.size, small)
    return Concrete(sizes)


def _has_blocks(site: Site) -> bool:
    """Whether a bias is one of a part of the queries or keys, whose number then depends on theirs."""
    return any(isinstance(part, Block) for _, part in emit.parts(site))


def _lie_beyond(site: Site, numbers: Iterable[int]) -> bool:
    """Whether some number lies within the sequences, but beyond those that were cut short."""
    roles = emit.result_of(site).roles
    longest = max((a.size for a in (*roles.query, *roles.key) if isinstance(a.size, int)), default=0)
    return any(LONGEST < n < longest for n in numbers)


def _lengths_of(mask: Mask) -> list[int]:
    match mask:
        case And(parts) | Or(parts):
            return [n for part in parts for n in _lengths_of(part)]
        case Window(n, offset):
            return [n, abs(offset.const)]
        case Causal(offset):
            return [abs(offset.const)]
        case First(n):
            return [n]
    return []


def _lengths(site: Site, sizes: Concrete) -> dict[Axis, int]:
    """A concrete length for every axis."""
    roles = emit.result_of(site).roles
    named = (roles.batch, roles.heads, roles.query, roles.key, roles.d, roles.dv, roles.more)
    own = (group for _, part in emit.parts(site) for group in part.layout or ())
    return {axis: sizes.of(axis.size) for axes in (*named, *own) for axis in axes}


def _values(site: Site, lengths: Mapping[Axis, int], family: "Family") -> dict[Node, Any]:
    generator = torch.Generator().manual_seed(0)
    values: dict[Node, Any] = {}
    for name, part in emit.parts(site):
        if part.node not in values:
            values[part.node] = _value(part, name, lengths, family, generator)
            if name.startswith("bias") and family is empty_rows and site.spec.mask == FULL:
                values[part.node] = _hiding(values[part.node], generator)
    return _with_small_scores(site, values, lengths) if site.unshifted else values


def _with_small_scores(site: Site, values: dict[Node, Any], lengths: Mapping[Axis, int]) -> dict[Node, Any]:
    """The same values with queries so small that exp of the scores exists."""
    q, k = (cast(Operand, site.operands[name]).node for name in "qk")
    width = product(lengths[a] for a in emit.result_of(site).roles.d)
    largest = float(values[q].abs().max() * values[k].abs().max()) * int(width) * abs(site.spec.scale)
    return values | {q: values[q] * min(1.0, LARGEST / max(largest, 1e-30))}


def _hiding(bias: Tensor, generator: torch.Generator) -> Tensor:
    """A bias may hide as a mask does; beside a mask it is taken to leave each row a key (docs/decisions.md, 16)."""
    return bias.where(_booleans(bias.shape, empty_rows, generator, hides=False), -torch.inf)


def _value(
    operand: Operand, name: str, lengths: Mapping[Axis, int], family: "Family", generator: torch.Generator
) -> Any:
    made = operand.node.meta["val"]
    if not isinstance(made, Tensor):
        return 0.25 + float(torch.rand((), generator=generator))
    shape = [int(product(lengths[a] for a in axes)) for axes in operand.dims]
    if made.dtype == torch.bool:
        return _booleans(shape, family, generator, hides=operand.negated)
    if not made.dtype.is_floating_point:
        return torch.randint(0, 2, shape, generator=generator)
    value = family(shape, generator)
    return _decaying(operand, value) if name == "log_decay" else value


def _decaying(operand: Operand, value: Tensor) -> Tensor:
    """Values that make `operand`, a log decay, negative, and small enough for exp(distance * |log decay|) to exist."""
    wanted = -value.abs().clamp_max(STEEPEST) / operand.factor
    return wanted.exp() if operand.function == "log" else wanted


def _booleans(shape: Sequence[int], family: "Family", generator: torch.Generator, *, hides: bool) -> Tensor:
    """A mask; in one family it hides most keys, and all of the first sequence or query."""
    if family is not empty_rows:
        return (torch.rand(shape, generator=generator) < 0.7) ^ hides
    value = torch.rand(shape, generator=generator) < 0.15
    if shape:
        value[0] = False
    return value ^ hides


Family = Callable[[Sequence[int], torch.Generator], Tensor]


def random(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal."""
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def equal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """All the same: ties everywhere."""
    del generator
    return torch.full(shape, 0.5, dtype=torch.float64)


def needles(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Mostly small, a few large: one position decides a row."""
    value = random(shape, generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.05, 30 * value, 0.1 * value)


def large(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Logits in the hundreds and more."""
    return 20 * random(shape, generator)


def empty_rows(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal; boolean masks drawn with it hide most keys, so that some rows see none."""
    return random(shape, generator)


FAMILIES: tuple[Family, ...] = (random, equal, needles, large, empty_rows)
