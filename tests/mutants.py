"""Small changes to graphs of attention, any of which may change what it computes: what a reader must not overlook."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

#: Picks one of n: 0 <= choose(n) < n.
Choose = Callable[[int], int]


class NoPlace(Exception):  # noqa: N818 - a mutation that this graph has no place for
    """The graph has no place for this mutation."""


def mutate(module: GraphModule, operator: str, choose: Choose) -> None:
    """Applies the named operator at a place that `choose` picks. Raises NoPlace; the graph may not run afterwards."""
    OPERATORS[operator](module.graph, choose)
    module.graph.lint()
    module.recompile()


def _pick(options: Sequence[Any], choose: Choose) -> Any:
    if not options:
        raise NoPlace
    return options[choose(len(options))]


def _calls(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if n.op == "call_function"]


def _tensors(graph: Graph, wanted: Callable[[Tensor], bool] = lambda _: True) -> list[Node]:
    """Nodes that make a tensor of the wanted kind."""
    values = ((n, n.meta.get("val")) for n in graph.nodes if n.op not in ("output", "get_attr"))
    return [n for n, value in values if isinstance(value, Tensor) and wanted(value)]


def _insert(graph: Graph, after: Node, target: Any, *rest: Any) -> Node:
    """`target(after, *rest)`, used by all that used `after`."""
    with graph.inserting_after(after):
        made = graph.call_function(target, (after, *rest))
    after.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    made.meta["val"] = after.meta.get("val")
    return made


def literal(graph: Graph, choose: Choose) -> None:
    """Another number: an offset, a dimension, a scale, a fill, a width."""
    places = [(n, i) for n in _calls(graph) for i, a in enumerate(n.args) if type(a) in {int, float}]
    node, place = _pick(places, choose)
    value = node.args[place]
    other = _pick([value + 1, value - 1, -value, 2 * value, 0 * value], choose)
    node.args = (*node.args[:place], other, *node.args[place + 1 :])


def listed_literal(graph: Graph, choose: Choose) -> None:
    """Another order of dimensions or sizes in a list."""
    places = [
        (n, i)
        for n in _calls(graph)
        for i, a in enumerate(n.args)
        if isinstance(a, list | tuple) and len(a) > 1 and all(type(x) is int for x in a)
    ]
    node, place = _pick(places, choose)
    values = list(node.args[place])
    first, second = choose(len(values)), choose(len(values))
    values[first], values[second] = values[second], values[first]
    node.args = (*node.args[:place], values, *node.args[place + 1 :])


def equation(graph: Graph, choose: Choose) -> None:
    """Two letters of an einsum change places."""
    node = _pick([n for n in _calls(graph) if n.target == aten.einsum.default], choose)
    letters = list(node.args[0])
    spots = [i for i, x in enumerate(letters) if x.isalpha()]
    first, second = _pick(spots, choose), _pick(spots, choose)
    letters[first], letters[second] = letters[second], letters[first]
    node.args = ("".join(letters), *node.args[1:])


_SWAPS = (
    (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default),
    (aten.tril.default, aten.triu.default),
    (aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor, aten.eq.Tensor, aten.ne.Tensor),
    (aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor),
    (aten.softmax.int, aten.log_softmax.int),
    (aten.tanh.default, aten.sin.default, aten.sigmoid.default),
    (aten.logical_not.default, aten.alias.default),
)


def operation(graph: Graph, choose: Choose) -> None:
    """Another operation with the same arguments."""
    places = [(n, group) for n in _calls(graph) for group in _SWAPS if n.target in group]
    node, group = _pick(places, choose)
    node.target = _pick([t for t in group if t != node.target], choose)


def operand_order(graph: Graph, choose: Choose) -> None:
    """Two operands change places."""
    places = [
        (n, i)
        for n in _calls(graph)
        for i in range(len(n.args) - 1)
        if all(isinstance(a, Node) for a in n.args[i : i + 2])
    ]
    node, i = _pick(places, choose)
    node.args = (*node.args[:i], node.args[i + 1], node.args[i], *node.args[i + 2 :])


def other_operand(graph: Graph, choose: Choose) -> None:
    """One operand is replaced by an earlier tensor."""
    order = {n: k for k, n in enumerate(graph.nodes)}
    places = [(n, a) for n in _calls(graph) for a in n.args if isinstance(a, Node)]
    node, old = _pick(places, choose)
    new = _pick([t for t in _tensors(graph) if order[t] < order[node] and t is not old], choose)
    node.replace_input_with(old, new)


def extra_user(graph: Graph, choose: Choose) -> None:
    """One more value is returned."""
    output = next(n for n in graph.nodes if n.op == "output")
    held = output.args[0]
    node = _pick([n for n in _tensors(graph) if n.op == "call_function"], choose)
    output.args = ((*(held if isinstance(held, list | tuple) else (held,)), node),)


_WRITES = ((aten.mul_.Scalar, 2.0), (aten.add_.Scalar, 1.0), (aten.neg_.default,), (aten.relu_.default,))


def write_in_place(graph: Graph, choose: Choose) -> None:
    """A tensor is written to, somewhere after it was made, whole or through a view."""
    node = _pick(_tensors(graph, lambda t: t.is_floating_point()), choose)
    order = list(graph.nodes)
    place = _pick(order[order.index(node) + 1 :], choose)
    with graph.inserting_before(place):
        through = node
        if choose(2) and node.meta["val"].dim():
            through = graph.call_function(aten.select.int, (node, choose(node.meta["val"].dim()), 0))
        target, *rest = _pick(_WRITES, choose)
        graph.call_function(target, (through, *rest))


def write_to_mask(graph: Graph, choose: Choose) -> None:
    """A boolean tensor is inverted in place, or one row or column of it filled."""
    node = _pick(_tensors(graph, lambda t: t.dtype == torch.bool), choose)
    order = list(graph.nodes)
    with graph.inserting_before(_pick(order[order.index(node) + 1 :], choose)):
        if choose(2) or not node.meta["val"].dim():
            graph.call_function(aten.logical_not_.default, (node,))
        else:
            row = graph.call_function(aten.select.int, (node, choose(node.meta["val"].dim()), 0))
            graph.call_function(aten.fill_.Scalar, (row, bool(choose(2))))


def polarity(graph: Graph, choose: Choose) -> None:
    """A condition is inverted."""
    node = _pick(_tensors(graph, lambda t: t.dtype == torch.bool), choose)
    _insert(graph, node, aten.logical_not.default)


def axis(graph: Graph, choose: Choose) -> None:
    """Two dimensions change places, or the elements of one move on."""
    node = _pick(_tensors(graph, lambda t: t.dim() > 1), choose)
    rank = node.meta["val"].dim()
    first, second = choose(rank), choose(rank)
    if choose(2):
        _insert(graph, node, aten.transpose.int, first, second)
    else:
        _insert(graph, node, aten.roll.default, [1], [first])


_EXTRA = (
    (aten.neg.default,), (aten.abs.default,), (aten.relu.default,), (aten.exp.default,), (aten.tanh.default,),
    (aten.mul.Tensor, 1.5), (aten.add.Tensor, -2.0), (aten.cumsum.default, -1), (aten.softmax.int, -1),
    (aten.clamp.default, -0.5, 0.5), (aten.flip.default, [-1]), (aten.sum.dim_IntList, [-1], True),
    (aten.dropout.default, 1.0, True),
)  # fmt: skip


def extra_operation(graph: Graph, choose: Choose) -> None:
    """One more operation on the way."""
    node = _pick(_tensors(graph, lambda t: t.is_floating_point()), choose)
    _insert(graph, node, *_pick(_EXTRA, choose))


def cast(graph: Graph, choose: Choose) -> None:
    """A detour through a type that keeps less."""
    node = _pick(_tensors(graph, lambda t: t.is_floating_point()), choose)
    narrow = _insert(graph, node, aten.to.dtype, _pick([torch.int64, torch.bool, torch.bfloat16], choose))
    _insert(graph, narrow, aten.to.dtype, node.meta["val"].dtype)


def left_out(graph: Graph, choose: Choose) -> None:
    """An operation is left out: its first tensor takes its place."""
    sources = ((n, n.args[0]) for n in _calls(graph) if n.args)
    node = _pick([n for n, source in sources if isinstance(source, Node) and source.op != "get_attr"], choose)
    node.replace_all_uses_with(node.args[0])
    graph.erase_node(node)


OPERATORS: dict[str, Callable[[Graph, Choose], None]] = {
    f.__name__: f
    for f in (
        literal, listed_literal, equation, operation, operand_order, other_operand, extra_user, write_in_place,
        write_to_mask, polarity, axis, extra_operation, cast, left_out,
    )
}  # fmt: skip
