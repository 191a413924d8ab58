"""More small changes, as `mutants`: to types, users, memory, axes and conditions."""

from typing import Any

import torch
from mutants import (
    Choose,
    aten,
    calls,
    conditions,
    floats,
    insert,
    operator,
    pick,
    shape,
    tensors,
    value,
)
from torch.fx import Graph, Node

# --- types and further uses ---


#: Single precision, which seldom shows, less often than the others.
_NARROW = 2 * (torch.int64, torch.bool, torch.bfloat16, torch.float16) + (torch.float32,)


@operator
def cast(graph: Graph, choose: Choose) -> None:
    """A detour through a type that keeps less."""
    node = pick(floats(graph), choose)
    made = value(node)
    narrow = insert(graph, node, aten.to.dtype, pick(_NARROW, choose))
    insert(graph, narrow, aten.to.dtype, made.dtype)  # type: ignore[union-attr]


@operator
def extra_user(graph: Graph, choose: Choose) -> None:
    """One more value is returned, or added to what is returned."""
    output = next(n for n in graph.nodes if n.op == "output")
    held = output.args[0]
    results = list(held) if isinstance(held, list | tuple) else [held]
    node = pick([n for n in floats(graph) if n.op == "call_function" and n not in results], choose)
    if choose(2):
        output.args = ((*results, node),)
        return
    at = pick([i for i, n in enumerate(results) if value(n) is not None], choose)
    with graph.inserting_before(output):
        total = graph.call_function(aten.sum.default, (node,))
        results[at] = graph.call_function(aten.add.Tensor, (results[at], total))
    output.args = (tuple(results),)


# --- memory ---

_WRITES = ((aten.mul_.Scalar, 2.0), (aten.add_.Scalar, 1.0), (aten.neg_.default,), (aten.relu_.default,))


def _before_a_use(graph: Graph, node: Node, choose: Choose) -> Any:
    """The context for inserting between a tensor and one of its uses, or somewhere later."""
    order = list(graph.nodes)
    users = [u for u in node.users if u.op == "call_function"]
    if users and choose(4):
        return graph.inserting_before(pick(users, choose))
    return graph.inserting_before(pick(order[order.index(node) + 1 :], choose))


@operator
def mutation(graph: Graph, choose: Choose) -> None:
    """A tensor, or part of it, is written to in place."""
    node = pick(floats(graph), choose)
    with _before_a_use(graph, node, choose):
        through = node
        if choose(2) and len(shape(node)):
            through = graph.call_function(aten.select.int, (node, choose(len(shape(node))), 0))
        target, *rest = pick(_WRITES, choose)
        graph.call_function(target, (through, *rest))


@operator
def mutation_of_a_condition(graph: Graph, choose: Choose) -> None:
    """A mask is inverted in place, or one row or column of it filled."""
    node = pick(conditions(graph), choose)
    with _before_a_use(graph, node, choose):
        if choose(2) or not shape(node):
            graph.call_function(aten.logical_not_.default, (node,))
        else:
            row = graph.call_function(aten.select.int, (node, choose(len(shape(node))), 0))
            graph.call_function(aten.fill_.Scalar, (row, bool(choose(2))))


@operator
def alias(graph: Graph, choose: Choose) -> None:
    """A view is taken where the tensor is made, and the tensor written to through it before it is used."""
    used = [n for n in floats(graph) if shape(n) and any(u.op == "call_function" for u in n.users)]
    node = pick(used, choose)
    rank, users = len(shape(node)), [u for u in node.users if u.op == "call_function"]
    views = [
        (aten.alias.default,), (aten.transpose.int, 0, rank - 1), (aten.unsqueeze.default, 0),
        (aten.slice.Tensor, choose(rank), 0, 2), (aten.select.int, choose(rank), 0),
    ]  # fmt: skip
    target, *rest = pick(views, choose)
    with graph.inserting_after(node):
        view = graph.call_function(target, (node, *rest))
    with graph.inserting_before(pick(users, choose)):
        target, *rest = pick(_WRITES, choose)
        graph.call_function(target, (view, *rest))


# --- axes ---


def _with_axes(graph: Graph, least: int) -> list[tuple[Node, int]]:
    """Tensors with at least so many dimensions, and their ranks."""
    return [(n, len(shape(n))) for n in tensors(graph) if len(shape(n)) >= least]


@operator
def axis(graph: Graph, choose: Choose) -> None:
    """Two dimensions of one size change places, or the elements of one move on."""
    node, rank = pick(_with_axes(graph, 1), choose)
    sizes = shape(node)
    pairs = [(a, b) for b in range(rank) for a in range(b) if sizes[a] == sizes[b] > 1]
    if pairs and choose(2):
        insert(graph, node, aten.transpose.int, *pick(pairs, choose))
        return
    long = [d for d in range(rank) if sizes[d] > 1]
    insert(
        graph,
        node,
        *pick(
            [(aten.roll.default, [1], [pick(long, choose)]), (aten.flip.default, [pick(long, choose)])],
            choose,
        ),
    )


@operator
def broadcast_axis(graph: Graph, choose: Choose) -> None:
    """One element along an axis stands for all of them."""
    node, rank = pick(_with_axes(graph, 1), choose)
    made = value(node)
    at = pick([d for d in range(rank) if shape(node)[d] > 1], choose)
    one = insert(graph, node, aten.slice.Tensor, at, 0, 1)
    if choose(4):  # else: left for broadcasting, or for what does not run
        size = [-1] * rank
        size[at] = made.shape[at] if isinstance(made.shape[at], int) else -1  # type: ignore[union-attr]
        if size[at] == -1:
            insert(graph, one, aten.repeat_interleave.self_int, shape(node)[at], at)
        else:
            insert(graph, one, aten.expand.default, size)


@operator
def head_order(graph: Graph, choose: Choose) -> None:
    """Heads (or what else a dimension counts) are dealt out in another order: a b -> b a."""
    places = [
        (n, d, part)
        for n, rank in _with_axes(graph, 2)
        for d in range(rank)
        for part in (2, 3)
        if shape(n)[d] > part and shape(n)[d] % part == 0
        if isinstance(value(n).shape[d], int)  # type: ignore[union-attr]
    ]
    if (repeats := [n for n in calls(graph) if n.target == aten.repeat_interleave.self_int]) and choose(2):
        node = pick(repeats, choose)
        counts = [1] * len(shape(node))
        counts[int(node.args[2])] = node.args[1]  # type: ignore[arg-type, call-overload]
        node.target, node.args = aten.repeat.default, (node.args[0], counts)
        return
    node, at, part = pick(places, choose)
    size = shape(node)[at]
    split = insert(graph, node, aten.unflatten.int, at, [part, size // part])
    turned = insert(graph, split, aten.transpose.int, at, at + 1)
    insert(graph, turned, aten.flatten.using_ints, at, at + 1)


# --- conditions, and what else may come in between ---


@operator
def polarity(graph: Graph, choose: Choose) -> None:
    """A condition is inverted, or the two cases of a where() change places."""
    branches = [
        n for n in calls(graph) if n.target in (aten.where.self, aten.where.ScalarOther, aten.where.Scalar)
    ]
    choices = [n for n in branches if n.target == aten.where.self]
    if choices and choose(2):
        node = pick(choices, choose)
        node.args = (node.args[0], node.args[2], node.args[1])
        return
    insert(graph, pick(conditions(graph), choose), aten.logical_not.default)


_EXTRA = (
    (aten.neg.default,), (aten.abs.default,), (aten.relu.default,), (aten.exp.default,), (aten.tanh.default,),
    (aten.mul.Tensor, 1.5), (aten.add.Tensor, -2.0), (aten.cumsum.default, -1), (aten.softmax.int, -1),
    (aten.clamp.default, -0.5, 0.5), (aten.flip.default, [-1]), (aten.tril.default,), (aten.triu.default,),
    (aten.dropout.default, 1.0, True), (aten.nan_to_num.default,),
)  # fmt: skip


@operator
def extra_operation(graph: Graph, choose: Choose) -> None:
    """One more operation on the way."""
    least = {aten.tril.default: 2, aten.triu.default: 2, aten.flip.default: 1, aten.cumsum.default: 1}
    target, *rest = pick(_EXTRA, choose)
    node = pick([n for n in floats(graph) if len(shape(n)) >= least.get(target, 0)], choose)
    insert(graph, node, target, *rest)
