"""Finds linear attention with exponential gates, whose weights are kept in range by a running maximum.

    weights = exp(D - m) * (q k^T)        o = (weights v) / max(|sum of weights|, exp(-m))        m = max D

(mLSTM, Beck et al. 2024, arXiv:2405.04517, eq. 19 to 27.) The bound of the sum tells it: it moves with the maximum.
"""

from collections import deque
from collections.abc import Callable, Iterator

from torch.fx import Node

from attnopt.passes.constants import constant
from attnopt.passes.layout import CASTS, RESHAPES, is_copy
from attnopt.passes.linear_product import product_of
from attnopt.passes.mask_writes import operation
from attnopt.shadow import Shadow

#: More nodes than stand between a sum of weights and the product that made them, or between a bound and its maximum.
REACH = 64
_LARGEST = frozenset({"max", "amax", "maximum", "cummax"})


def stabilised(shadow: Shadow) -> Iterator[tuple[Node, Node]]:
    """The divisions by such a sum, each with what bounds it."""
    for node in shadow.nodes:
        if node in shadow.live and operation(node) == "div":
            yield from ((node, bound) for bound in _bounds(node))


def _bounds(node: Node) -> Iterator[Node]:
    above, below = node.args[:2]
    if not isinstance(above, Node) or not isinstance(below, Node) or not _has_above(above, _is_product):
        return
    larger = _plain(below)
    if operation(larger) in ("maximum", "max") and len(larger.all_input_nodes) == 2:
        total, bound = sorted(map(_plain, larger.all_input_nodes), key=lambda n: operation(n) != "abs")
        if operation(total) == "abs" and _has_above(total, _is_product) and _moves(bound):
            yield bound


def _is_product(node: Node) -> bool:
    return product_of(node) is not None


def _moves(node: Node) -> bool:
    """Whether a bound is exp(-m) of something that is made of a maximum."""
    power = _plain(node.args[0]) if operation(node) == "exp" else None  # type: ignore[arg-type]
    return (
        power is not None
        and operation(power) == "neg"
        and _has_above(power, lambda n: operation(n) in _LARGEST)
    )


def _plain(node: Node) -> Node:
    """Above views, casts, and numbers that are added."""
    while node.op == "call_function" and isinstance(node.args[0] if node.args else None, Node):
        is_moved = node.target in RESHAPES or node.target in CASTS or is_copy(node)
        is_shifted = operation(node) == "add" and constant(node.args[1]) is not None
        if not is_moved and not is_shifted:
            break
        node = node.args[0]  # type: ignore[assignment]
    return node


def _has_above(node: Node, wanted: Callable[[Node], bool]) -> bool:
    """Whether one of the nearest nodes above is wanted."""
    pending, seen = deque([node]), {node}
    while pending and len(seen) < REACH:
        for source in pending.popleft().all_input_nodes:
            if source.op == "call_function" and wanted(source):
                return True
            if source not in seen:
                seen.add(source)
                pending.append(source)
    return False
