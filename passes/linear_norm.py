"""What surrounds the sum that a linear attention is divided by: sum + eps, max(|sum|, floor), their inverses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.fx import Node

from attnopt.passes.constants import constant, present
from attnopt.passes.layout import CASTS, Dims, Space, step_up
from attnopt.passes.linear_product import End
from attnopt.passes.mask_writes import arguments, operation
from attnopt.rule import Reject


@dataclass(frozen=True, slots=True)
class Divisor:
    """factor * (sum + eps), or factor * max(|sum|, floor); what `sum` holds is still to be read.

    signed: max(sum, floor). detached: no gradient goes through it. path: the nodes between the division and the sum.
    """

    sum: End
    factor: float = 1.0
    eps: float = 0.0
    floor: float | None = None
    signed: bool = False
    detached: bool = False
    path: tuple[Node, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether nothing is known yet but a factor, so that more may follow."""
        return self.eps == 0.0 and self.floor is None


def read_divisor(space: Space, end: End) -> Divisor:
    """The divisor `end`, down to the sum in it."""
    return _peel(space, Divisor(end))


def inverse_of(space: Space, end: End) -> Divisor | None:
    """The divisor whose inverse `end` is: multiplying by 1 / (sum + eps) divides."""
    if not isinstance(end.node.meta.get("val"), Tensor):
        return None
    found = _peel(space, Divisor(end))
    node = found.sum.node
    if not found.is_plain or found.factor == 0 or not _is_inverse(node):
        return None
    inner = End(node.args[0], found.sum.dims, node)  # type: ignore[arg-type]
    return _peel(space, Divisor(inner, 1 / found.factor, path=(*found.path, node)))


def _is_inverse(node: Node) -> bool:
    name = operation(node)
    return name == "reciprocal" or (name == "pow" and constant(node.args[1]) == -1.0)


def _peel(space: Space, found: Divisor) -> Divisor:
    while True:
        node = found.sum.node
        step = _step(space, node, found.sum.dims, found)
        if step is None:
            return found
        source, dims, inner = step
        found = replace(inner, sum=End(source, dims, node), path=(*inner.path, node))


def _step(space: Space, node: Node, dims: Dims, found: Divisor) -> tuple[Node, Dims, Divisor] | None:
    """One node nearer to the sum."""
    if node.op != "call_function":
        return None
    if node.target in CASTS and node.meta["val"].dtype.is_floating_point:
        return node.args[0], dims, found  # type: ignore[return-value]
    if operation(node) == "detach":
        return node.args[0], dims, replace(found, detached=True)  # type: ignore[return-value]
    try:
        moved = step_up(space, node, dims)
    except Reject:
        return None
    if moved is not None:
        return *moved, found
    read = _SURROUNDINGS.get(operation(node))
    inner = None if read is None or not found.is_plain else read(arguments(node), found)
    return None if inner is None else (inner[0], dims, inner[1])


Inner = tuple[Node, Divisor]


def _sides(held: Mapping[str, Any]) -> list[tuple[Node, float]]:
    """An operation on a tensor and a constant, whichever comes first."""
    left, right = held["self"], held.get("other")  # torch.max along a dimension has no other
    pairs = [(left, present(right)), (right, present(left))]
    return [(tensor, number) for tensor, number in pairs if isinstance(tensor, Node) and number is not None]


def _scaled(held: Mapping[str, Any], found: Divisor) -> Inner | None:
    return next(((source, replace(found, factor=found.factor * n)) for source, n in _sides(held)), None)


def _shifted(held: Mapping[str, Any], found: Divisor) -> Inner | None:
    if held.get("alpha", 1) != 1:
        return None
    return next(((source, replace(found, eps=n)) for source, n in _sides(held)), None)


def _clamped(held: Mapping[str, Any], found: Divisor) -> Inner | None:
    return None if held.get("max") is not None else _floored(held["self"], present(held.get("min")), found)


def _larger(held: Mapping[str, Any], found: Divisor) -> Inner | None:
    read = (_floored(source, n, found) for source, n in _sides(held))
    return next((inner for inner in read if inner is not None), None)


def _floored(source: Node, floor: float | None, found: Divisor) -> Inner | None:
    """max(|sum|, floor), or max(sum, floor)."""
    if floor is None:
        return None
    if operation(source) not in ("abs", "absolute"):
        return source, replace(found, floor=floor, signed=True)
    inner: Node = source.args[0]  # type: ignore[assignment]
    return inner, replace(found, floor=floor, path=(*found.path, source))


_SURROUNDINGS: Mapping[str, Callable[[Mapping[str, Any], Divisor], Inner | None]] = MappingProxyType(
    {
        "mul": _scaled,
        "add": _shifted,
        "clamp": _clamped,
        "clamp_min": _clamped,
        "maximum": _larger,
        "max": _larger,
    }
)
