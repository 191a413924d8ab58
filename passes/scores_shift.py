"""What is added to a whole row of logits: a softmax takes no notice of it, if it is finite wherever the row is."""

import operator

import torch
from torch.fx import Node

from attnopt.passes.layout import CASTS, COPIES, EXPANDS, Axes, Dims, broadcast_up, input_node
from attnopt.passes.sizes import shape_of

aten = torch.ops.aten

#: Operations that hand on the numbers of a tensor.
_SAME = frozenset({*COPIES, *CASTS, aten.detach.default})


def tops_of(added: Node, scores: Node, dims: Dims) -> Axes:
    """The axes along which `added` is the largest of `scores`, which is added to it; () where it is anything else.

    Such a term is finite in each row that has a finite logit. dims: of the sum.
    """
    node, restored = added, None
    while node.target in _SAME:
        node = input_node(node)
    if node.target == aten.unsqueeze.default:
        restored = int(node.args[1])  # type: ignore[arg-type]
        node = input_node(node)
    while node.target in _SAME:
        node = input_node(node)
    found = _reduction(node)
    if found is None or _origin(found[0]) is not _origin(scores):
        return ()
    rank, dim, kept = len(shape_of(scores)), found[1], found[2]
    at = dim % rank
    if kept != (restored is None) or (restored is not None and restored % rank != at):
        return ()
    return broadcast_up(dims, shape_of(scores))[at]


def unexpanded(added: Node) -> Node:
    """What is the same addend, once it is broadcast: as it was before it was expanded to the shape of the scores."""
    return input_node(added) if added.target in EXPANDS else added


def _origin(node: Node) -> Node:
    while node.target in _SAME and node.meta["val"].dtype == input_node(node).meta["val"].dtype:
        node = input_node(node)
    return node


def _reduction(node: Node) -> tuple[Node, int, bool] | None:
    """Of the largest element along one dimension: the tensor, the dimension, and whether it is kept with length 1."""
    if node.target == aten.amax.default:
        dims = node.args[1] if len(node.args) > 1 else ()
        listed = [dims] if isinstance(dims, int) else list(dims)  # type: ignore[arg-type]
        kept = bool(node.args[2]) if len(node.args) > 2 else bool(node.kwargs.get("keepdim", False))
        return (input_node(node), int(listed[0]), kept) if len(listed) == 1 else None
    if node.target is operator.getitem and node.args[1] == 0:
        pair = input_node(node)
        if pair.target == aten.max.dim:
            kept = bool(pair.args[2]) if len(pair.args) > 2 else False
            return input_node(pair), int(pair.args[1]), kept  # type: ignore[arg-type]
    return None
