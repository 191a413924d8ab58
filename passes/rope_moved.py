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


def moved_back(
    growth: Growth, cut: Slice, positions: Sequence[Node], last: int, offset: Node | int
) -> dict[Node, Node]:
    """Each root of `cut` -> the same with every query at place min(t, last), where query i stands at t = i + offset.

    positions: the sources of the slice that count the queries. What does not depend on them is used as it is.
    """
    for source in positions:
        rows = cut.rows.get(source)
        if rows is None:
            growth.known[source] = _clamped(growth, source, last, offset)
        else:
            growth.known[source] = _rows(growth, source, rows, last, offset)
    moving = cut.below(positions)
    for node in cut.nodes:
        if node in moving:
            growth.known[node] = growth.copy(node)
    return {root: growth.known.get(root, root) for root in cut.roots}


def _clamped(growth: Growth, source: Node, last: int, offset: Node | int) -> Node:
    """Positions less what their query is beyond the last place."""
    value: Tensor = source.meta["val"]
    dim = counting_dim(value.shape)
    _, excess = _excess(growth, source, dim, last, offset)
    if value.dtype.is_floating_point:
        excess = growth.call(aten.to.dtype, excess, value.dtype)
    for _ in range(value.dim() - 1 - dim):
        excess = growth.call(aten.unsqueeze.default, excess, -1)
    return growth.call(aten.sub.Tensor, source, excess)


def _rows(growth: Growth, source: Node, rows: Rows, last: int, offset: Node | int) -> Node:
    """The rows of a table that belong to those places, in the stead of a slice."""
    index, excess = _excess(growth, source, rows.dim, last, offset)
    place = growth.call(aten.sub.Tensor, index, excess)
    if rows.start != 0:
        place = growth.call(aten.add.Tensor, place, rows.start)
    return growth.call(aten.index_select.default, rows.table, rows.dim, place)


def _excess(growth: Growth, source: Node, dim: int, last: int, offset: Node | int) -> tuple[Node, Node]:
    """How far each query is beyond the last place, and its number."""
    index = growth.call(aten.arange.default, _size(growth, source, dim), device=source.meta["val"].device)
    start = offset - last if isinstance(offset, int) else growth.call(operator.sub, offset, last)
    return index, growth.call(aten.clamp.default, growth.call(aten.add.Tensor, index, start), 0)


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
            total = _plus(growth, total, factor, _length(growth, side))
    return total


def _length(growth: Growth, side: Along) -> Node | int:
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
