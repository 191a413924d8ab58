"""The second query of a stream: what the graph makes of the same query at another position, as nodes of the shadow."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from attnopt.mask import Length
from attnopt.passes.layout import Axes, Dims
from attnopt.passes.rope_slice import Slice
from attnopt.passes.rope_tables import Rows
from attnopt.passes.rope_trial import counting_dim
from attnopt.passes.sizes import Size, shape_of
from attnopt.rule import Reject
from attnopt.shadow import fake_mode

aten = torch.ops.aten


@dataclass(slots=True)
class Growth:
    """Adds nodes to a shadow before one of its nodes; `known` holds what became of those that were moved."""

    graph: Graph
    place: Node
    known: dict[Node, Node] = field(default_factory=dict)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """A new node, with its fake value."""
        with self.graph.inserting_before(self.place):
            node = self.graph.call_function(target, args, kwargs)
        with fake_mode([self.place.meta["val"]]), torch.no_grad():
            node.meta["val"] = target(*map_arg(args, _value), **map_arg(kwargs, _value))
        return node

    def copy(self, node: Node) -> Node:
        """The same computation of what was moved."""
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.known.get(n, n))
        return self.call(node.target, *args, **kwargs)


def _value(node: Node) -> Any:
    return node.meta["val"]


@dataclass(frozen=True, slots=True)
class Beyond:
    """index (Sq,): the numbers of the queries. excess (Sq,): how far each is beyond the last place; or (B, Sq)."""

    index: Node
    excess: Node

    @property
    def is_apart(self) -> bool:
        """Whether each sequence has its own."""
        value: Tensor = self.excess.meta["val"]
        return value.dim() > 1


def moved_back(
    growth: Growth, cut: Slice, positions: Sequence[Node], beyond: Beyond, counts: Sequence[Size]
) -> dict[Node, Node]:
    """Each root of `cut` -> the same with every query moved back to the last place, if it is beyond.

    positions: the sources of the slice that count the queries. What does not depend on them is used as it is. counts:
    how many queries and keys there are.
    """
    for source in positions:
        rows = cut.rows.get(source)
        if rows is None:
            growth.known[source] = _clamped(growth, source, counting_dim(shape_of(source), counts), beyond)
        else:
            growth.known[source] = _rows(growth, rows, beyond)
    moving = cut.below(positions)
    for node in cut.nodes:
        if node in moving:
            growth.known[node] = growth.copy(node)
    return {root: growth.known.get(root, root) for root in cut.roots}


def _clamped(growth: Growth, source: Node, dim: int, beyond: Beyond) -> Node:
    """Positions less what their query is beyond the last place."""
    value: Tensor = source.meta["val"]
    excess = beyond.excess
    if value.dtype.is_floating_point:
        excess = growth.call(aten.to.dtype, excess, value.dtype)
    for _ in range(value.dim() - 1 - dim):
        excess = growth.call(aten.unsqueeze.default, excess, -1)
    return growth.call(aten.sub.Tensor, source, excess)


def _rows(growth: Growth, rows: Rows, beyond: Beyond) -> Node:
    """The rows of a table that belong to those places, in the stead of a slice."""
    place = growth.call(aten.sub.Tensor, beyond.index, beyond.excess)
    if rows.start != 0:
        place = growth.call(aten.add.Tensor, place, rows.start)
    return growth.call(aten.index_select.default, rows.table, rows.dim, place)


def _size(growth: Growth, node: Node, dim: int) -> Node | int:
    size = node.meta["val"].shape[dim]
    return size if isinstance(size, int) else growth.call(aten.sym_size.int, node, dim)


@dataclass(frozen=True, slots=True)
class Along:
    """A tensor, its dimensions, and the axes whose length is meant."""

    node: Node
    dims: Dims
    axes: Axes


def offset_of(growth: Growth, length: Length, query: Along, key: Along) -> Node | int:
    """A length as a number of the graph."""
    total: Node | int = length.const
    for factor, side in ((length.sq, query), (length.sk, key)):
        if factor:
            total = _plus(growth, total, factor, length_of(growth, side))
    return total


def length_of(growth: Growth, side: Along) -> Node | int:
    """How long the axes are, as a number of the graph."""
    if not side.axes:
        return 1
    if side.axes not in side.dims:
        raise Reject("the length of queries and keys is no dimension of its own", side.node)
    return _size(growth, side.node, side.dims.index(side.axes))


def _plus(growth: Growth, total: Node | int, factor: int, size: Node | int) -> Node | int:
    """total + factor * size."""
    if isinstance(size, Node):
        scaled: Node | int = size if factor == 1 else growth.call(operator.mul, size, factor)
    else:
        scaled = factor * size
    if isinstance(total, int) and isinstance(scaled, int):
        return total + scaled
    return growth.call(operator.add, total, scaled)
