"""Finds delta rules in their chunked form: the inverse of a triangle of products of keys with keys."""

from collections import deque
from collections.abc import Iterator

from torch import Tensor
from torch.fx import Node

from attnopt.passes.linear_chain import leads_to_product
from attnopt.passes.linear_product import product_of
from attnopt.passes.mask_writes import operation, writes_after
from attnopt.shadow import Shadow

#: Nodes between a row of a triangle and the rows that it is made of.
NEAR = 32


def solved(shadow: Shadow) -> Iterator[Node]:
    """The first triangular solve with each matrix made of products, and the last row of each forward substitution."""
    triangles: set[Node] = set()
    for node in shadow.nodes:
        if node not in shadow.live or node.op != "call_function":
            continue
        if operation(node) == "linalg_solve_triangular" and node.args[0] not in triangles:
            triangles.update(node.all_input_nodes[:1])
            if leads_to_product(node.all_input_nodes[0]):
                yield node
        if operation(node) == "copy" and _is_last_row(node):
            yield node


def _is_last_row(write: Node) -> bool:
    """Whether a row is written into a matrix that is made of other rows of that matrix, and no row follows."""
    target, source = write.args[:2]
    if (
        not isinstance(target, Node)
        or not isinstance(source, Node)
        or operation(target) not in ("slice", "select")
    ):
        return False
    base = base_of(write)
    return writes_after(base, None)[-1:] == [write] and _is_made_of(source, base) and leads_to_product(base)


def base_of(write: Node) -> Node:
    """The tensor into a part of which a copy writes."""
    node: Node = write.args[0]  # type: ignore[assignment]
    while operation(node) in ("slice", "select", "alias") and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _is_made_of(node: Node, base: Node) -> bool:
    """Whether parts of `base` enter `node` through a product, or a sum of products, that stands near above it.

    Scores to which products are added in place, as positions are, are multiplied with nothing.
    """
    start = (node, product_of(node) is not None)
    pending, seen = deque([start]), {start}
    while pending and len(seen) <= NEAR:
        at, multiplied = pending.popleft()
        above = [n for n in at.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if base in above and multiplied:
            return True
        states = {(n, multiplied or product_of(n) is not None) for n in above if n is not base}
        fresh = sorted(states - seen)
        seen.update(fresh)
        pending.extend(fresh)
    return False
