"""Whether the memory layout of what a call makes shows, and whether it is that of the graph."""

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._sympy.functions import Max

from attnopt.passes.sizes import Size, hint, is_one, product, same, size_of
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

#: Tensors of more dimensions may be images, whose channels may lie last.
_LARGEST_PLAIN = 3


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
    for dim in reversed(order):
        size, stride = value.shape[dim], size_of(value.stride()[dim])
        if not is_one(size_of(size)) and not same(_of_filled(stride), size_of(inner)):
            return False
        inner = inner * size
    return True


def _of_filled(stride: Size) -> Size:
    """A stride without the bounds of sizes in it: where it is the product of sizes above 0, max(1, n) is n.

    torch counts an empty dimension as one element when it lays out memory.
    """
    return stride if isinstance(stride, int) else product(map(_unbounded, sympy.Mul.make_args(stride)))


def _unbounded(factor: sympy.Expr) -> sympy.Expr:
    if isinstance(factor, Max) and len(factor.args) == 2 and 1 in factor.args:
        return next(arg for arg in factor.args if arg != 1)
    return factor


def laid_out(value: Tensor, wanted: Tensor) -> Tensor:
    """The elements of `value` in memory as `wanted` has its own."""
    order = memory_order(wanted)
    if _has_gaps(wanted, order):
        return value.new_empty_strided(wanted.shape, wanted.stride()).copy_(value)
    if order == sorted(order):
        return value.contiguous()
    back = [order.index(d) for d in range(len(order))]
    return value.permute(order).contiguous().permute(back)


def _has_gaps(value: Tensor, order: list[int]) -> bool:
    """Whether the elements lie apart, as those of a part of a larger tensor do, and none lies on another."""
    if not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
        return False  # symbols that a trace of the call has not met
    reach = 1
    for dim in reversed(order):
        size, stride = value.shape[dim], value.stride()[dim]
        if size > 1 and stride < reach:
            return False
        reach = max(reach, stride * size)
    return not _is_dense(value, order)


def shows_layout(shadow: Shadow, node: Node) -> bool:
    """Whether the value, or a view of it, leaves the graph or meets an operation that may see its layout.

    A `view` may; and what works element by element does, since its result is laid out alike.
    """
    users = [user for user in shadow.users(node) if not _forgets(user)]
    return node in shadow.results or any(
        user.target not in _STRIDED or shows_layout(shadow, user) for user in users
    )


def _forgets(user: Node) -> bool:
    """Whether what `user` makes is laid out alike, whatever its inputs are; images are joined as they lie."""
    if user.target in (aten.cat.default, aten.stack.default) and user.meta["val"].dim() > _LARGEST_PLAIN:
        return False
    return user.target in _FORGETFUL
