"""Numbers that a graph computes without looking at its inputs; and those that it was given, as they are now."""

from collections.abc import Callable
from math import exp, isfinite, log
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.mask_writes import writes_after
from attnopt.passes.sizes import seen_float
from attnopt.shadow import CONSTANT

aten = torch.ops.aten

#: A chain longer than this is not a scale that somebody wrote down.
MAX_DEPTH = 16


def constant(value: Any) -> float | None:
    """`value` as a number if it is one, or if it is a tensor without dimensions made of constants only; else None."""
    made = value.meta.get("val") if isinstance(value, Node) else None
    return None if isinstance(made, Tensor) and made.dim() > 0 else uniform(value)


def uniform(value: Any) -> float | None:
    """The number that `value` is, or that a tensor of any shape, made of constants, holds everywhere; else None."""
    return _held(value, _certain)


def present(value: Any) -> float | None:
    """As `uniform`, and a symbolic float that came in from outside counts as the number that it is now.

    Who reads it relies on attnopt.passes.settle: before a site is rewritten, each symbolic float in it that is no
    operand is fixed by a guard of Dynamo's, so that another value compiles anew.
    """
    return _held(value, seen_float)


def _certain(value: torch.SymFloat) -> float | None:
    return float(value.node.expr) if value.node.expr.is_number else None


#: What a symbolic float is, if that is known.
Known = Callable[[torch.SymFloat], float | None]


def _held(value: Any, known: Known, depth: int = 0) -> float | None:
    if isinstance(value, bool | int | float):
        return float(value)
    made = value.meta.get("val") if isinstance(value, Node) else None
    if isinstance(made, torch.SymFloat):
        return known(made)
    if not isinstance(made, Tensor) or depth > MAX_DEPTH:
        return None
    if value.op == "placeholder":
        return _single(value.meta.get(CONSTANT))
    if value.op == "get_attr":
        return _single(getattr(value.graph.owning_module, str(value.target), None))
    number = _evaluate(value, known, depth)
    return None if number is None or writes_after(value, None) else number


def _single(held: Any) -> float | None:
    """The one element of a tensor that no training changes."""
    return float(held) if type(held) is Tensor and held.numel() == 1 else None


def _evaluate(node: Node, known: Known, depth: int) -> float | None:
    if node.target in _HOLDS:
        return _rounded(_held(node.args[_HOLDS[node.target]], known, depth + 1), node)
    if node.target in _FIXED:
        return _FIXED[node.target]
    operation = _ARITHMETIC.get(node.target)
    if operation is None or node.kwargs:
        return None
    numbers: list[float] = []
    for (
        argument
    ) in node.args:  # one that is data ends it, so that a graph that forks is not followed everywhere
        number = _held(argument, known, depth + 1)
        if number is None:
            return None
        numbers.append(number)
    try:
        return _rounded(operation(*numbers), node)
    except (ZeroDivisionError, OverflowError):
        return None


def _rounded(value: float | None, node: Node) -> float | None:
    """As the graph holds it: a float32 square root is not the double one."""
    dtype = node.meta["val"].dtype
    if not isinstance(value, float) or not _fits(value, dtype):
        return None
    return float(torch.tensor(value, dtype=dtype))


def _fits(value: float, dtype: torch.dtype) -> bool:
    """Whether a type holds the number: what a cast to integers makes of another depends on the machine."""
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        return dtype != torch.bool or isfinite(value)
    return isfinite(value) and torch.iinfo(dtype).min <= int(value) <= torch.iinfo(dtype).max


#: Operations that hold one of their arguments everywhere, and which one.
_HOLDS = {
    aten.full.default: 1, aten.full_like.default: 1, aten.new_full.default: 2, aten.scalar_tensor.default: 0,
    **dict.fromkeys(
        (
            aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.clone.default, aten.contiguous.default,
            aten.detach.default, aten.detach_.default, aten.alias.default, aten.to.dtype, aten.to.device, aten.to.other,
            aten._to_copy.default, aten.to.dtype_layout, aten.type_as.default, aten.expand.default,
            aten.expand_as.default, aten.view.default, aten.reshape.default, aten.unsqueeze.default,
            aten.squeeze.default, aten.squeeze.dim,
        ),
        0,
    ),
}  # fmt: skip
_FIXED = {
    **dict.fromkeys((aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default), 0.0),
    **dict.fromkeys((aten.ones.default, aten.ones_like.default, aten.new_ones.default), 1.0),
}
_ARITHMETIC: dict[object, Callable[..., Any]] = {
    aten.sqrt.default: lambda x: x**0.5,
    aten.rsqrt.default: lambda x: x**-0.5,
    aten.reciprocal.default: lambda x: 1 / x,
    aten.neg.default: lambda x: -x,
    aten.exp.default: exp,
    aten.log.default: lambda x: log(x) if x > 0 else None,
    aten.add.Tensor: lambda x, y: x + y,
    aten.sub.Tensor: lambda x, y: x - y,
    aten.rsub.Scalar: lambda x, y: y - x,
    aten.mul.Tensor: lambda x, y: x * y,
    aten.mul.Scalar: lambda x, y: x * y,
    aten.div.Tensor: lambda x, y: x / y,
    aten.div.Scalar: lambda x, y: x / y,
    aten.pow.Tensor_Scalar: lambda x, y: x**y,
    aten.pow.Scalar: lambda x, y: x**y,
    aten.pow.Tensor_Tensor: lambda x, y: x**y,
}
