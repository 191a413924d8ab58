"""Whether the memory layout of what a call makes shows, and whether it is that of the graph."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.sizes import hint, is_one, same, size_of
from attnopt.shadow import Shadow

aten = torch.ops.aten

#: Operations that keep the memory of their input.
_STRIDED = frozenset(
    {
        aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor,
        aten.select.int, aten.alias.default, aten.t.default, aten.mT.default, aten.to.dtype, aten.detach.default,
        aten.reshape.default, aten.flatten.using_ints,
    }
)  # fmt: skip


#: Operations after which the memory layout of their input no longer shows.
_FORGETFUL = frozenset(
    {
        aten.contiguous.default, aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default,
        aten.addmm.default, aten.baddbmm.default, aten.einsum.default, aten.cat.default, aten.stack.default,
    }
)  # fmt: skip


def memory_order(value: Tensor) -> list[int]:
    """The dimensions from the one with the longest stride to the one with the shortest."""
    strides = [hint(s) for s in value.stride()]
    return sorted(range(len(strides)), key=lambda d: (-strides[d], d))


def is_laid_out_as(made: Tensor, wanted: Tensor) -> bool:
    """Whether strides agree, for certain, in every dimension that has more than one element."""
    places = zip(made.shape, made.stride(), wanted.stride(), strict=True)
    if all(is_one(size_of(size)) or same(size_of(a), size_of(b)) for size, a, b in places):
        return True
    order = memory_order(wanted)
    # Equal sizes have many symbolic forms, and strides with them; what is dense in one order is laid out alike.
    alike = [hint(s) for s in made.shape] == [hint(s) for s in wanted.shape]
    return alike and _is_dense(made, order) and _is_dense(wanted, order)


def _is_dense(value: Tensor, order: list[int]) -> bool:
    """Whether the elements lie one after the other, for certain, the dimensions in this order, major first."""
    inner: Any = 1
    least: Any = 1  # torch counts an empty dimension as one element when it lays out memory
    for dim in reversed(order):
        size, stride = value.shape[dim], size_of(value.stride()[dim])
        if not is_one(size_of(size)) and not (same(stride, size_of(inner)) or same(stride, size_of(least))):
            return False
        inner, least = inner * size, least * torch.sym_max(1, size)
    return True


def shows_layout(shadow: Shadow, node: Node) -> bool:
    """Whether the value, or a view of it, leaves the graph or meets an operation that may see its layout.

    A `view` may; and what works element by element does, since its result is laid out alike.
    """
    users = [user for user in shadow.users(node) if user.target not in _FORGETFUL]
    return node in shadow.results or any(
        user.target not in _STRIDED or shows_layout(shadow, user) for user in users
    )
