"""Roles of the tensors that enter a region, told from its Jacobian: which output depends on which element of what.

All functions of a region are smooth, so whether an element matters is the same for almost all values: one backward
pass from one element of the output, at random values in fp64, shows for each tensor the elements that reach it. For
o[b, h, i, e] these are q[b, h, i, :], k[b, h, :i+1, :], v[b, h, :i+1, e], state[b, h, :, e] and decays[b, h, :i+1],
however the region is spelled and laid out. A second element, at other indices, tells dimensions of equal size apart.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.linear_loop_alike import Shapes
from attnopt.passes.linear_loop_numbers import factors
from attnopt.passes.linear_loop_tables import Table
from attnopt.passes.replay import evaluate
from attnopt.passes.reroll_cut import Region
from attnopt.passes.reroll_sizes import name_of
from attnopt.passes.sizes import Concrete, hint, seen_symbols
from attnopt.rule import Reject

#: What one dimension of a tensor has to do with the output. "one": its size is 1; ("at", d): only the index that
#: dimension d of the output has matters; ("upto", d): all up to it; "all": each; "other": something else.
Pattern = tuple[Any, ...]
ONE, ALL, OTHER = ("one",), ("all",), ("other",)

#: The largest total decay that trials draw: what lies far back must still be seen.
GENTLE = 4.0


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a region. values: of all nodes; given: of the leaves, as drawn."""

    values: Mapping[Node, Any]
    given: Mapping[Node, Tensor]


@dataclass(frozen=True, slots=True)
class Draw:
    """How values are drawn. seed; sign: that of what stands in an exponent; spread: of its total over the sequence."""

    seed: int
    sign: float = 1.0
    spread: float = GENTLE
    positive: bool = True  # whether data are drawn around 1, else around 0
    shorter: bool = False  # whether symbolic lengths are one less than seen while tracing
    factors: frozenset[Node] = (
        frozenset()
    )  # what multiplies the state at each step: powers of it must not vanish
    doubled: Node | None = None  # a number of the graph that is twice what it would be


def sizes_of(region: Region, how: "Draw") -> Concrete:
    """The sizes of the graph; symbols as seen while tracing, the length's perhaps one less."""
    held = [size for leaf in region.leaves for size in leaf.meta["val"].shape]
    sizes = Concrete(symbols=seen_symbols((*held, *(node.meta["val"] for node in region.numbers))))
    if how.shorter:
        for symbol in symbols_of(region):
            sizes.symbols[symbol] -= 1
    return sizes


def symbols_of(region: Region) -> frozenset[Any]:
    """The symbol that is the length of whole sequences, where it is one."""
    held = [
        size for leaf in region.leaves for size in leaf.meta["val"].shape if isinstance(size, torch.SymInt)
    ]
    return frozenset(s.node.expr for s in held if s.node.expr.is_Symbol and hint(s) == region.length)


def run(
    region: Region, tables: Sequence[Table], how: Draw, shapes: Shapes, *, gradients: bool = False
) -> Trial:
    """The region at random values of its leaves; tables follow from the decay that they hold powers of.

    shapes: of tensors that are to have other ones than in the graph.
    """
    sizes, generator = sizes_of(region, how), torch.Generator().manual_seed(how.seed)
    wanted = {node: [sizes.of(size) for size in shape] for node, shape in shapes.items()}
    exponents = {*in_exponents(region), *(t.base for t in tables)}
    held = {table.node for table in tables}
    given: dict[Node, Tensor] = {}
    for leaf in (*region.leaves, *(t.base for t in tables)):
        if leaf not in held and leaf not in given:
            shape = wanted.get(leaf) or [sizes.of(size) for size in leaf.meta["val"].shape]
            if leaf in how.factors:
                given[leaf] = _drawn(shape, generator, region, how, logged=True).exp()
            else:
                given[leaf] = _drawn(shape, generator, region, how, logged=leaf in exponents)
    for table in tables:
        shape = wanted.get(table.node) or [sizes.of(s) for s in table.node.meta["val"].shape]
        given[table.node] = table.formula(shape, given[table.base])
    if gradients:
        given = {leaf: value.requires_grad_() if leaf not in held else value for leaf, value in given.items()}
    numbers = {node: sizes.number(node.meta["val"]) for node in region.numbers}
    for node in factors(region):
        drawn = 0.5 + float(torch.rand((), generator=generator, dtype=torch.float64))
        numbers[node] = 2.0 * drawn if node is how.doubled else drawn
    with torch.set_grad_enabled(gradients):
        values = evaluate(region.nodes, {**given, **numbers}, sizes, wanted)
    return Trial(values, given)


def _drawn(
    shape: Sequence[int], generator: torch.Generator, region: Region, how: Draw, *, logged: bool
) -> Tensor:
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    if logged:
        return how.sign * (0.2 + 0.8 * uniform) * how.spread / max(hint(region.length), 1)
    return 0.5 + uniform if how.positive else torch.randn(shape, generator=generator, dtype=torch.float64)


def in_exponents(region: Region) -> frozenset[Node]:
    """The leaves of which an exponential is taken."""
    inside = set(region.nodes)
    pending = [n.args[0] for n in region.nodes if name_of(n) in ("exp", "exp2")]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, Node) and node not in seen:
            seen.add(node)
            if node in inside:
                pending += node.all_input_nodes
    return frozenset(seen.intersection(region.leaves))


def indices(shape: Sequence[int], dim: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two elements of the output whose pairs of indices differ between any two dimensions of equal size.

    Along `dim`, which counts positions, they are the last two.
    """
    used: set[tuple[int, int, int]] = set()
    pairs: dict[int, tuple[int, int]] = {dim: (shape[dim] - 1, max(shape[dim] - 2, 0))}
    used.add((shape[dim], *pairs[dim]))
    for d, n in enumerate(shape):
        if d != dim:
            options = [(0, 1), (1, 0), (1, 1), (0, 0), (0, 2), (2, 0), (1, 2)] if n > 1 else [(0, 0)]
            fits = [pair for pair in options if max(pair) < n and (n, *pair) not in used]
            pairs[d] = (fits or options)[0]
            used.add((n, *pairs[d]))
    order = range(len(shape))
    return tuple(pairs[d][0] for d in order), tuple(pairs[d][1] for d in order)


@dataclass(frozen=True, slots=True)
class Probe:
    """One element of an output, `at` these indices, and its derivative by each tensor (None: it has none)."""

    at: tuple[int, ...]
    value: float
    slopes: Mapping[Node, Tensor | None]


def probe(trial: Trial, end: Node, leaves: Sequence[Node], dim: int) -> tuple[Probe, Probe]:
    """Two elements of the tensor `end`, as `indices` has them."""
    first, second = indices(trial.values[end].shape, dim)
    return _probe(trial, end, leaves, first), _probe(trial, end, leaves, second)


def _probe(trial: Trial, end: Node, leaves: Sequence[Node], at: tuple[int, ...]) -> Probe:
    free = [leaf for leaf in leaves if trial.given[leaf].requires_grad]
    element = trial.values[end][at]
    found = torch.autograd.grad(
        element, [trial.given[leaf] for leaf in free], retain_graph=True, allow_unused=True
    )
    return Probe(at, float(element.detach()), dict(zip(free, found, strict=True)))


def patterns(shape: Sequence[int], probes: tuple[Probe, Probe]) -> dict[Node, tuple[Pattern, ...] | None]:
    """What each dimension of each leaf has to do with an output of that shape; None for a leaf that has nothing."""
    first, second = probes
    found: dict[Node, tuple[Pattern, ...] | None] = {}
    for leaf, slope in first.slopes.items():
        grads = [grad for grad in (slope, second.slopes[leaf]) if grad is not None]
        found[leaf] = _pattern(grads, (first.at, second.at), tuple(shape)) if len(grads) == 2 else None
    return found


def _pattern(
    grads: Sequence[Tensor], probes: Sequence[tuple[int, ...]], shape: Sequence[int]
) -> tuple[Pattern, ...] | None:
    if not all(bool((g != 0).any()) for g in grads):
        return None
    result: list[Pattern] = []
    for d, size in enumerate(grads[0].shape):
        reached = [
            tuple((g.movedim(d, 0).reshape(size, -1) != 0).any(1).nonzero().flatten().tolist()) for g in grads
        ]
        alike = [n for n in range(len(shape)) if shape[n] == size]
        result.append(ONE if size == 1 else _of_dimension(reached, probes, size, alike))
    return tuple(result)


def _of_dimension(
    reached: Sequence[tuple[int, ...]], probes: Sequence[tuple[int, ...]], size: int, alike: Sequence[int]
) -> Pattern:
    """alike: the dimensions of the output that have this size."""
    for d in alike:
        at = [probe[d] for probe in probes]
        if all(r == (i,) for r, i in zip(reached, at, strict=True)):
            return ("at", d)
    for d in alike:
        at = [probe[d] for probe in probes]
        ranges = [(tuple(range(i + 1)), tuple(range(1, i + 1))) for i in at]
        if at[0] != at[1] and all(r in both for r, both in zip(reached, ranges, strict=True)):
            return ("upto", d)
    return ALL if all(r == tuple(range(size)) for r in reached) else OTHER


def is_linear_in(trial: Trial, found: Probe, leaves: Sequence[Node]) -> bool:
    """Whether the output is linear in these tensors together, by Euler's theorem: the sum of x * d out / d x is out."""
    pairs = [
        (trial.given[leaf].detach(), slope) for leaf in leaves if (slope := found.slopes[leaf]) is not None
    ]
    total = sum((float((x * slope).sum()) for x, slope in pairs), 0.0)
    return abs(total - found.value) <= 1e-9 * max(abs(found.value), 1e-30)


def mixes(
    trial: Trial, end: Node, found: Probe, leaves: tuple[Node, Node], along: Callable[[Node], int]
) -> bool:
    """Whether the slope of the output by the first feature of one tensor depends on another feature of the other one.

    along: of a tensor, the dimension of its features.
    """
    left, right = leaves
    (slope,) = torch.autograd.grad(trial.values[end][found.at], [trial.given[left]], create_graph=True)
    total = slope.select(along(left), 0).sum()
    if not total.requires_grad:
        return False
    (by,) = torch.autograd.grad(total, [trial.given[right]], retain_graph=True, allow_unused=True)
    return by is not None and bool((by.narrow(along(right), 1, by.shape[along(right)] - 1) != 0).any())


def gradient(trial: Trial, total: Tensor, leaf: Node) -> Tensor:
    """d total / d leaf. Raises Reject where it depends on it not at all."""
    (found,) = torch.autograd.grad(total, [trial.given[leaf]], retain_graph=True, allow_unused=True)
    if found is None:
        raise Reject(f"nothing depends on {leaf.name}", leaf)
    return found
