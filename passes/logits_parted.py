"""Biases into which a mask was filled before they were added to the scores: the mask, and what it was filled into."""

from collections.abc import Callable, Mapping

from torch.fx import Node

from attnopt.passes.constants import uniform
from attnopt.passes.layout import Dims, Space, broadcast_up, step_up
from attnopt.passes.mask_writes import arguments, operation, writes_after
from attnopt.passes.sizes import same, shape_of
from attnopt.passes.terms import Fill, Term
from attnopt.rule import Reject

#: Views and copies between where a bias is filled and where it is added.
MOST_STEPS = 16


def told_apart(
    space: Space, terms: Mapping[int, Term], is_hiding: Callable[[Fill], bool]
) -> tuple[list[Fill], dict[int, Term]]:
    """The masks that were filled into some of the terms, and these terms without, each under its number."""
    found = {n: part for n, term in terms.items() if (part := parted(space, term)) and is_hiding(part[0])}
    return [fill for fill, _ in found.values()], {n: term for n, (_, term) in found.items()}


def parted(space: Space, term: Term) -> tuple[Fill, Term] | None:
    """An added tensor as one that is filled only afterwards: with the mask, and as it was before.

    That is the same wherever the fill leaves a query a key: what is filled in weighs nothing there. None for a tensor
    that is not filled, or is multiplied or written to on its way.
    """
    node, dims, reader = term.node, term.dims, term.at
    for _ in range(MOST_STEPS):
        if term.times or term.factor <= 0 or writes_after(node, reader):
            return None
        filled = _filled(node)
        if filled is not None:
            condition, value, before, hides = filled
            fill = Fill(
                condition, broadcast_up(dims, shape_of(condition)), value * term.factor, hides,
                node.meta["val"].dtype, term.casts, node,
            )  # fmt: skip
            bias = Term(before, broadcast_up(dims, shape_of(before)), term.factor, casts=term.casts, at=node)
            return fill, bias
        higher = above(space, node, dims)
        if higher is None:
            return None
        reader, (node, dims) = node, higher
    return None


def above(space: Space, node: Node, dims: Dims) -> tuple[Node, Dims] | None:
    """Through a view, or a slice that keeps all there is; None for anything else."""
    source = arguments(node).get("self")
    if operation(node) == "slice" and isinstance(source, Node) and _is_whole(node, source):
        return source, dims
    try:
        return step_up(space, node, dims)
    except Reject:
        return None


def _is_whole(node: Node, source: Node) -> bool:
    return all(same(a, b) for a, b in zip(shape_of(node), shape_of(source), strict=True))


def _filled(node: Node) -> tuple[Node, float, Node, bool] | None:
    """The condition, the number that is filled in, what it is filled into, and whether that is where it holds."""
    if node.op != "call_function" or operation(node) not in ("masked_fill", "where"):
        return None
    held = arguments(node)
    if operation(node) == "masked_fill":
        found = [(held["mask"], held["value"], held["self"], True)]
    else:
        condition = held.get("condition")
        found = [
            (condition, held.get("other"), held.get("self"), False),
            (condition, held.get("self"), held.get("other"), True),
        ]
    for condition, value, before, hides in found:
        number = uniform(value)
        if number is None or not isinstance(condition, Node) or not isinstance(before, Node):
            continue
        if uniform(before) is None:
            return condition, number, before, hides
    return None
