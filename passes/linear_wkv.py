"""Finds running means weighted by exponentials: (x p + y v) / (x r + y), with p and r carried from step to step."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from attnopt.passes.mask_writes import operation
from attnopt.shadow import Shadow


@dataclass(frozen=True, slots=True)
class Mean:
    """node = (old * above + new * value) / (old * below + new)."""

    node: Node
    above: Node
    below: Node


def running_means(shadow: Shadow) -> Iterator[Node]:
    """The last mean of each loop (RWKV, Peng et al. 2023, arXiv:2305.13048, eq. 16)."""
    found = [m for node in shadow.nodes if node in shadow.live for m in _mean(node)]
    for mean in found:
        if _is_carried(mean) and not any(mean.above in _sources(other.above) for other in found):
            yield mean.node


def _is_carried(mean: Mean) -> bool:
    """Whether numerator and denominator are sums of the same kind themselves: this is not the first step."""
    return all(operation(x) == "add" for x in (mean.above, mean.below))


def _sources(node: Node) -> set[Node]:
    return {n for term in node.all_input_nodes for n in (term, *term.all_input_nodes)}


def _mean(node: Node) -> Iterator[Mean]:
    if operation(node) != "div" or not all(isinstance(x, Node) for x in node.args[:2]):
        return
    above, below = node.args[:2]
    if operation(above) != "add" or operation(below) != "add":  # type: ignore[arg-type]
        return
    for product, new in (below.args[:2], below.args[1::-1]):  # type: ignore[union-attr]
        pairs = _terms(above)  # type: ignore[arg-type]
        if isinstance(product, Node) and operation(product) == "mul" and isinstance(new, Node):
            yield from _matched(node, product, new, pairs)


def _terms(total: Node) -> list[Node]:
    return [x for x in total.args[:2] if isinstance(x, Node) and operation(x) == "mul"]


def _matched(node: Node, product: Node, new: Node, terms: list[Node]) -> Iterator[Mean]:
    """The factor of the old sums stands in both, and the weight of the new value is added below."""
    for old, below in _orders(product):
        carried = [p for term in terms for x, p in _orders(term) if x is old]
        if carried and any(new in term.args[:2] for term in terms) and isinstance(below, Node):
            yield Mean(node, carried[0], below)
            return


def _orders(product: Node) -> list[tuple[Node, Node]]:
    left, right = product.args[:2]
    both = [(left, right), (right, left)]
    return [(a, b) for a, b in both if isinstance(a, Node) and isinstance(b, Node)]
