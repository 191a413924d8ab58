"""Factors of queries and keys that the program itself makes infinite, such as 0 to the power of a negative distance.

Data may enter: 1 / (slope * 0) is infinite, whatever the slope. Such factors are tried with several drawn data.

Q K^T times infinity is infinite where it is summed with the values; on q or on k it enters other sums, and makes other
elements NaN.
"""

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.mask_writes import sharing, written_by
from attnopt.passes.replay import evaluate
from attnopt.passes.site import Operand
from attnopt.passes.sizes import Concrete, hint
from attnopt.rule import Reject

#: Nodes and elements that are computed to learn what a factor holds; what is larger is taken to be finite.
MOST_NODES, MOST_ELEMENTS = 128, 1 << 22
#: The same for factors that data enter.
MOST_DRAWN_NODES, MOST_DRAWN_ELEMENTS = 32, 1 << 18

#: What data may be, from different numbers between 0 and 1. Whether they are rates, their logarithms or gates before a
#: sigmoid: for some of these an exponential of their sums over thousands of positions does not overflow.
DRAWS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda uniform: 0.5 + uniform,
    lambda uniform: -0.5 - uniform,
    lambda uniform: 1e-6 * uniform,
    lambda uniform: 32 + uniform,
    lambda uniform: -32 - uniform,
)


def check_finite(factors: Iterable[Operand], of: str = "weights") -> None:
    """Raises Reject for a factor that is infinite somewhere, or NaN, if it follows from sizes and numbers alone.

    With data in it, it is refused if it is infinite at the same place whatever is drawn. of: what it multiplies.
    """
    for factor in factors:
        if _is_infinite(factor):
            raise Reject(
                f"the {of} are multiplied by a number for each position that is infinite for some; "
                "choose the base of a power and the divisor of a quotient other than 0",
                factor.node,
            )


def _is_infinite(factor: Operand) -> bool:
    nodes, data = _sources(factor.node)
    if len(nodes) > (MOST_DRAWN_NODES if data else MOST_NODES):
        return False
    if not data:
        value = _value(factor, nodes, data, DRAWS[0])
        return value is not None and not bool(value.isfinite().all())
    infinite: Tensor | None = None
    for draw in DRAWS:
        value = _value(factor, nodes, data, draw)
        if value is None:
            return False
        infinite = value.isinf() if infinite is None else infinite & value.isinf()
        if not bool(infinite.any()):
            return False
    return True


def _sources(node: Node) -> tuple[set[Node], set[Node]]:
    """What a factor is made of: operations, sizes among them, and data; no operations if it costs too much."""
    nodes, data, pending = set[Node](), set[Node](), [node]
    while pending:
        here = pending.pop()
        if here in nodes or here in data:
            continue
        value = here.meta.get("val")
        if isinstance(value, Tensor) and _is_data(here, value):
            data.add(here)
            continue
        whole = isinstance(value, int | torch.SymInt)
        if len(nodes) == MOST_NODES or not (whole or _is_cheap(here, value)):
            return set(), set()
        nodes.add(here)
        pending.extend(() if whole else here.all_input_nodes)
    return nodes, data


def _value(
    factor: Operand, nodes: set[Node], data: set[Node], draw: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """The factor at sizes with the same literals, in fp64; None where there is nothing to compute it from."""
    sizes = Concrete()
    values: dict[Node, Any] = {}
    for node in (*nodes, *data):
        value = node.meta.get("val")
        if isinstance(value, int | torch.SymInt):
            values[node] = sizes.of(value)
        elif node in data and isinstance(value, Tensor):
            uniform = _uniform([sizes.of(size) for size in value.shape])
            values[node] = draw(uniform) if value.is_floating_point() else _every_other(uniform)
    try:
        made = evaluate(sorted(nodes - {*values}), values, sizes).get(factor.node)
    except (RuntimeError, IndexError, ValueError):
        return None  # the sizes at hand do not fit its literals
    if not isinstance(made, Tensor):
        return None
    return 1 / made.double() if factor.inverse else made.double()


def _uniform(shape: list[int]) -> Tensor:
    """Numbers between 0 and 1, no two alike, the same at every call."""
    count = prod(shape)
    return ((torch.arange(count, dtype=torch.float64) + 0.5) / max(count, 1)).view(shape)


def _every_other(uniform: Tensor) -> Tensor:
    """A mask that says yes and no: what is infinite for either of them is infinite for some."""
    return (torch.arange(uniform.numel()) % 2 == 0).view(uniform.shape)


def _is_data(node: Node, value: Tensor) -> bool:
    """Whether it is a small input, or parameter, of which any numbers, or truths, may be expected."""
    return (
        node.op in ("placeholder", "get_attr")
        and (value.is_floating_point() or value.dtype == torch.bool)
        and prod(hint(size) for size in value.shape) <= MOST_DRAWN_ELEMENTS
    )


def _is_cheap(node: Node, value: object) -> bool:
    """Whether the node makes the same few numbers at every call, and nobody writes to them."""
    target: Any = node.target
    return (
        node.op == "call_function"
        and isinstance(value, Tensor)
        and torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ())
        and prod(hint(size) for size in value.shape) <= MOST_ELEMENTS
        and not any(written_by(alias) or any(map(written_by, alias.users)) for alias in sharing(node))
    )
