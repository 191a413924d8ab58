"""Reads the sum of a row of weights, however it is spelled, as a product of the queries and the keys of a site."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, permutations
from typing import Any

from torch.fx import Node

from attnopt.passes.layout import CASTS, Axes, Axis, Dims, Space, input_node, step_up
from attnopt.passes.linear_chain import STRANGE, Triangle, Weighting, end_of, steps_of
from attnopt.passes.linear_product import End, ends_of, plain_product_of, product_of
from attnopt.passes.linear_roles import Base, Trio
from attnopt.passes.mask_writes import arguments, operation
from attnopt.passes.sizes import shape_of
from attnopt.rule import Reject

#: More nodes than any sum of weights is made of.
LONGEST = 48


@dataclass(frozen=True, slots=True)
class RowSum:
    """sum over the axes `summed` of the product of `ends`, under `weighting`. detached: no gradient goes through it."""

    ends: tuple[End, ...] = ()
    summed: Axes = ()
    weighting: Weighting = field(default_factory=Weighting)
    detached: bool = False

    def times(self, other: "RowSum") -> "RowSum":
        """The product of both. Raises Reject where gradients go through one of them only."""
        if self.detached or other.detached:
            path = (*self.weighting.path, *other.weighting.path)
            raise Reject("a part of what the output is divided by is detached", path[0], 1)
        a, b = self.weighting, other.weighting
        both = Weighting(
            a.scale * b.scale, a.factors + b.factors, a.divisors + b.divisors, a.gates + b.gates,
            a.triangles + b.triangles, a.path + b.path, a.beside + b.beside, a.strange + b.strange,
        )  # fmt: skip
        return RowSum(self.ends + other.ends, self.summed + other.summed, both)


_NO_SUM = "what the output is divided by is no sum of weights"
_WHY = {"abs": ", but of their absolute values, which needs each of them; take the absolute value of the sum"}


@dataclass(frozen=True, slots=True)
class SumReader:
    """Walks upwards to the base tensors `bases`; what does not come from them is a factor."""

    space: Space
    bases: frozenset[Node]

    def read(self, end: End, depth: int = 0) -> RowSum:
        """The sum that a tensor holds. Raises Reject for anything but products, sums, scales and masks."""
        node = end.node
        if node in self.bases:
            return RowSum((end,))
        if not self._comes_from_bases(node):
            return RowSum(weighting=Weighting(factors=(end,)))
        if depth > LONGEST or node.op != "call_function":
            raise Reject(_NO_SUM, node, 1)
        found = self._step(node, end.dims, depth + 1)
        return replace(found, weighting=replace(found.weighting, path=(node, *found.weighting.path)))

    def _step(self, node: Node, dims: Dims, depth: int) -> RowSum:
        form = product_of(node) or plain_product_of(node)
        if form is not None:
            ends = ends_of(self.space, form, dims)
            known, inside = (
                {a for d in group for a in self._leaves(d)} for group in ([dims], [e.dims for e in ends])
            )
            found = self._all(ends, depth)
            new = tuple(a for a in inside if a not in known)
            weighting = found.weighting.times(form.factor)
            weighting = replace(weighting, path=(*form.inner[:-1], *weighting.path))
            return replace(found, summed=found.summed + new, weighting=weighting)
        if node.target in CASTS and node.meta["val"].dtype.is_floating_point:
            return self.read(End(input_node(node), dims, node), depth)
        if operation(node) == "detach":
            return replace(self.read(End(input_node(node), dims, node), depth), detached=True)
        moved = step_up(self.space, node, dims)
        if moved is not None:
            return self.read(End(*moved, node), depth)
        return self._operation(node, dims, depth)

    def _leaves(self, dims: Dims) -> Iterator[Axis]:
        return chain.from_iterable(map(self.space.leaves, dims))

    def _operation(self, node: Node, dims: Dims, depth: int) -> RowSum:
        held = arguments(node)
        match operation(node):
            case "sum":
                return self._sum(node, dims, held, depth)
            case "cumsum":
                return self._running(node, dims, held, depth)
        steps = steps_of(node, dims)
        if operation(node) == "mul" and len(steps) == 2:
            return self._all((end_of(held[name], dims, node) for name in ("self", "other")), depth)
        if len(steps) != 1 or operation(node) in STRANGE:
            raise Reject(_NO_SUM + _WHY.get(operation(node), ""), node, 1)
        found = self.read(End(steps[0].node, steps[0].dims, node), depth)
        return replace(found, weighting=steps[0].fold(found.weighting))

    def _all(self, ends: Iterable[End], depth: int) -> RowSum:
        total = RowSum()
        for end in ends:
            total = total.times(self.read(end, depth))
        return total

    def _sum(self, node: Node, dims: Dims, held: Any, depth: int) -> RowSum:
        source = held["self"]
        rank, over = len(shape_of(source)), held.get("dim")
        places = {d % rank for d in (range(rank) if over is None else over)}
        kept = iter(dims if not held.get("keepdim") else [d for n, d in enumerate(dims) if n not in places])
        shape = shape_of(source)
        inside = tuple(self.space.fresh(shape[n]) if n in places else next(kept) for n in range(rank))
        found = self.read(End(source, inside, node), depth)
        return replace(found, summed=found.summed + tuple(a for n in places for a in inside[n]))

    def _running(self, node: Node, dims: Dims, held: Any, depth: int) -> RowSum:
        """A running sum up to i is a sum over all j under a triangle."""
        place = held["dim"] % len(dims)
        fresh = self.space.fresh(shape_of(node)[place])
        inside = (*dims[:place], fresh, *dims[place + 1 :])
        found = self.read(End(held["self"], inside, node), depth)
        under = Triangle(dims[place], fresh, 0, lower=True)
        weighting = replace(found.weighting, triangles=(*found.weighting.triangles, under))
        return replace(found, summed=found.summed + fresh, weighting=weighting)

    def _comes_from_bases(self, node: Node) -> bool:
        first = min(self.bases)
        pending, seen = [node], {node}
        while pending:
            fresh = [n for n in pending.pop().all_input_nodes if n not in seen and not n < first]
            if self.bases.intersection(fresh):
                return True
            seen.update(fresh)
            pending.extend(fresh)
        return False


def as_site_axes(space: Space, found: RowSum, trio: Trio) -> Weighting:
    """The weighting of a row sum over queries and keys, its summed axes renamed to theirs. Raises Reject."""
    rows = frozenset((*trio.shared, *trio.alone))
    for order in permutations((trio.q, trio.k)):
        names = _names(space, found, order, rows)
        if names is not None and {names[a] for a in _summed(space, found)} == {*trio.d, *trio.key}:
            return _renamed(space, found.weighting, names)
    node = found.weighting.path[0] if found.weighting.path else trio.q.node
    raise Reject(
        "what the output is divided by is not the sum of the weights of these queries and keys", node, 1
    )


def _summed(space: Space, found: RowSum) -> set[Axis]:
    return {a for axis in found.summed for a in space.leaves((axis,))}


def _names(
    space: Space, found: RowSum, bases: Sequence[Base], rows: frozenset[Axis]
) -> dict[Axis, Axis] | None:
    """Each axis of the sum -> that of the site, `rows` to themselves; None if they do not match one to one."""
    if len(found.ends) != 2:
        return None
    names: dict[Axis, Axis] = {axis: axis for axis in rows}
    for end, base in zip(found.ends, bases, strict=True):
        theirs, ours = space.resolve(end.dims), space.resolve(base.dims)
        if end.node is not base.node or list(map(len, theirs)) != list(map(len, ours)):
            return None
        for axis, own in zip(chain.from_iterable(theirs), chain.from_iterable(ours), strict=True):
            if names.setdefault(axis, own) is not own:
                return None
    summed = _summed(space, found)
    fits = (
        names.keys() == summed | rows and summed.isdisjoint(rows) and len(set(names.values())) == len(names)
    )
    return names if fits else None


def _renamed(space: Space, found: Weighting, names: dict[Axis, Axis]) -> Weighting:
    def rename(axes: Axes) -> Axes:
        return tuple(names.get(a, a) for a in space.leaves(axes))

    def all_of(dims: Dims) -> Dims:
        return tuple(map(rename, dims))

    return replace(
        found,
        factors=tuple(replace(f, dims=all_of(f.dims)) for f in found.factors),
        divisors=tuple(replace(d, dims=all_of(d.dims)) for d in found.divisors),
        gates=tuple(replace(g, dims=all_of(g.dims)) for g in found.gates),
        triangles=tuple(replace(t, rows=rename(t.rows), columns=rename(t.columns)) for t in found.triangles),
    )
