"""What a shadow node does to its arguments: reads their elements, asks only for their shape, or writes to them."""

from collections.abc import Mapping
from operator import getitem

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree


def reads(user: Node, node: Node) -> bool:
    """Whether `user` needs the elements of `node`."""
    shape_only = _SHAPE_OF.get(user.target)
    return shape_only is None or any(
        arg is node for place, arg in enumerate(user.args) if place != shape_only
    )


#: Operations that take only shape and dtype from the argument at this place.
_SHAPE_OF: Mapping[object, int] = {
    torch.ops.aten.expand_as.default: 1,
    torch.ops.aten.view_as.default: 1,
    torch.ops.aten.reshape_as.default: 1,
    torch.ops.aten.type_as.default: 1,
    torch.ops.aten.to.other: 1,
    **dict.fromkeys(
        (
            torch.ops.aten.sym_size.int, torch.ops.aten.zeros_like.default, torch.ops.aten.ones_like.default,
            torch.ops.aten.full_like.default, torch.ops.aten.empty_like.default, torch.ops.aten.new_zeros.default,
            torch.ops.aten.new_ones.default, torch.ops.aten.new_full.default, torch.ops.aten.new_empty.default,
        ),
        0,
    ),
}  # fmt: skip


def mutates(node: Node) -> bool:
    """Whether the node writes to one of its arguments, or has another effect."""
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # taking out one of several results writes nothing
        return node.target is not getitem and not _is_scalar(node)
    return bool(schema.is_mutable)


def written(node: Node) -> list[Node]:
    """The arguments that a node writes to; all tensor arguments if it does not say."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.all_input_nodes
    named = {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    targets = (
        named.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
    )
    return [n for target in targets for n in pytree.tree_leaves(target) if isinstance(n, Node)]


def _is_scalar(node: Node) -> bool:
    """Python arithmetic on sizes has no schema and no effect."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
