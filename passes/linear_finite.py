"""Factors of queries and keys that the program itself makes infinite, such as 0 to the power of a negative distance.

Q K^T times infinity is infinite where it is summed with the values; on q or on k it enters other sums, and makes other
elements NaN.
"""

from collections.abc import Iterable
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


def check_finite(factors: Iterable[Operand]) -> None:
    """Raises Reject for a factor that follows from sizes and numbers alone, and is not finite everywhere."""
    for factor in factors:
        sizes = Concrete()
        held = _held(factor.node, sizes)
        if held is not None and not bool((1 / held if factor.inverse else held).isfinite().all()):
            raise Reject(
                "the weights are multiplied by a number for each position that is infinite for some; "
                "choose the base of a power and the divisor of a quotient other than 0",
                factor.node,
            )


def _held(node: Node, sizes: Concrete) -> Tensor | None:
    """The value of a tensor that no data enter, at sizes with the same literals; None for another."""
    nodes: set[Node] = set()
    numbers: dict[Node, Any] = {}
    pending = [node]
    while pending:
        here = pending.pop()
        if here in nodes or here in numbers:
            continue
        value = here.meta.get("val")
        if isinstance(value, int | torch.SymInt):
            numbers[here] = sizes.of(value)
            continue
        if not _is_cheap(here, value) or len(nodes) == MOST_NODES:
            return None
        nodes.add(here)
        pending.extend(here.all_input_nodes)
    try:
        made = evaluate(sorted(nodes), numbers, sizes).get(node)
    except (RuntimeError, IndexError, ValueError):
        return None  # the sizes at hand do not fit its literals
    return made.double() if isinstance(made, Tensor) else None


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
