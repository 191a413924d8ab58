"""Numbers that a graph computes without looking at its inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.shadow import CONSTANT

aten = torch.ops.aten

#: A chain longer than this is not a scale that somebody wrote down.
MAX_DEPTH = 16


def constant(value: Any, depth: int = 0) -> float | None:
    """`value` as a number if it is one, or if it is a one-element tensor made of constants only; else None."""
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, Node) or depth > MAX_DEPTH:
        return None
    made = value.meta.get("val")
    if not isinstance(made, Tensor) or made.dim() > 0:
        return None
    if value.op == "placeholder":
        held = value.meta.get(CONSTANT)
        return None if held is None else float(held)
    if value.op == "get_attr":
        return _attribute(value)
    return _evaluate(value, depth)


def _attribute(node: Node) -> float | None:
    owner = node.graph.owning_module
    held = getattr(owner, str(node.target), None)
    if not isinstance(held, Tensor) or isinstance(held, torch.nn.Parameter) or type(held) is not Tensor:
        return None
    return float(held)


def _evaluate(node: Node, depth: int) -> float | None:
    if node.target in _FULL:
        return _held(constant(node.args[1], depth + 1), node)
    if node.target in _SAME:
        return _held(constant(node.args[0], depth + 1), node)
    if node.target in _FIXED:
        return _FIXED[node.target]
    operation = _ARITHMETIC.get(node.target)
    if operation is None:
        return None
    numbers = [constant(a, depth + 1) for a in node.args]
    if any(n is None for n in numbers):
        return None
    return _rounded(operation(*numbers), node)


def _held(value: float | None, node: Node) -> float | None:
    return None if value is None else _rounded(value, node)


def _rounded(value: float, node: Node) -> float:
    """As the graph holds it: a float32 square root is not the double one."""
    return float(torch.tensor(value, dtype=node.meta["val"].dtype))


_FULL = frozenset({aten.full.default})
_FIXED = {aten.zeros.default: 0.0, aten.ones.default: 1.0}
_SAME = frozenset(
    {
        aten.scalar_tensor.default, aten.lift_fresh_copy.default, aten.clone.default, aten.detach.default,
        aten.to.dtype, aten.to.device, aten._to_copy.default, aten.to.dtype_layout, aten.alias.default,
        aten.lift_fresh.default,
        aten.detach_.default,
    }
)  # fmt: skip
_ARITHMETIC: dict[object, Callable[..., float]] = {
    aten.sqrt.default: lambda x: x**0.5,
    aten.rsqrt.default: lambda x: x**-0.5,
    aten.reciprocal.default: lambda x: 1 / x,
    aten.neg.default: lambda x: -x,
    aten.mul.Tensor: lambda x, y: x * y,
    aten.mul.Scalar: lambda x, y: x * y,
    aten.div.Tensor: lambda x, y: x / y,
    aten.div.Scalar: lambda x, y: x / y,
    aten.pow.Tensor_Scalar: lambda x, y: x**y,
    aten.pow.Scalar: lambda x, y: x**y,
    aten.pow.Tensor_Tensor: lambda x, y: x**y,
}
