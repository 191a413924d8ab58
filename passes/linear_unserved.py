"""Names recurrences that are linear attention in a wider sense and that no kernel states: delta rules, vector gates.

    delta rule     S = S (I - beta k k^T) + beta k^T v     (Yang et al. 2024, arXiv:2406.06484; gated, arXiv:2412.06464)
    vector gates   S = diag(a) S + k^T v                   (Yang et al. 2023, arXiv:2312.06635; WKV, arXiv:2305.13048)
    exponential    S = exp(f) S + exp(i) k^T v, with a maximum taken out of both gates    (mLSTM, arXiv:2405.04517)

Here in the forms that are no plain loop over a state: a delta rule in chunks, which inverts a triangle of products of
keys with keys, WKV, which carries a numerator and a denominator, and mLSTM, whose divisor is bounded by the maximum.
Nothing is read, so that nothing can be wrong.
"""

from collections import deque
from collections.abc import Iterator, Mapping

import torch
from torch.fx import Node

from attnopt.passes.linear_product import product_of
from attnopt.passes.linear_roles import is_weight
from attnopt.passes.linear_solved import base_of, solved
from attnopt.passes.linear_stabilised import stabilised
from attnopt.passes.linear_wkv import running_means
from attnopt.passes.mask_writes import operation, writes_after
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow

aten = torch.ops.aten

#: More facts than any reading of a part of such a recurrence establishes.
DEPTH = 50
#: Where the recurrences of a graph are kept while it is read: in the metadata of its shadow.
_KEY = "attnopt_unserved"

_DELTA = "a delta rule: the state is multiplied by a matrix, I - beta k k^T, which no kernel states yet"
_VECTOR = (
    "a gate for each channel: the state is multiplied by a vector at each step, which no kernel states yet"
)
_EXPONENTIAL = (
    "exponential gates with a running maximum (as in mLSTM): the maximum bounds the sum that the output is divided by, "
    "which no kernel states yet"
)


class UnservedRule:
    """Recurrences whose state is multiplied by more than a number."""

    name = "linear recurrence"
    anchors = frozenset({aten.div.Tensor, aten.linalg_solve_triangular.default, aten.copy_.default})

    def read(self, anchor: Node, shadow: Shadow) -> Site:
        """Never a site. Raises Reject, of depth -1 where no such recurrence ends."""
        reason = _named(shadow).get(anchor)
        if reason is None:
            raise Reject("no state is multiplied by more than a number here", anchor, -1)
        above = before(shadow, anchor) if reason == _EXPONENTIAL else ()
        raise Reject(reason, anchor, DEPTH, frozenset((*after(shadow, anchor), *above)))


def _named(shadow: Shadow) -> Mapping[Node, str]:
    held: dict[Node, str] | None = shadow.module.meta.get(_KEY)
    if held is None:
        held = dict(_found(shadow))
        shadow.module.meta[_KEY] = held
    return held


def _found(shadow: Shadow) -> Iterator[tuple[Node, str]]:
    """The last node of each recurrence; what follows from another one's state has no entry of its own."""
    covered: set[Node] = set()
    for node, reason in sorted(_all(shadow), key=lambda pair: shadow.order[pair[0]]):
        if node not in covered:
            yield node, reason
            covered.update(after(shadow, node))


def _all(shadow: Shadow) -> Iterator[tuple[Node, str]]:
    yield from ((node, _DELTA) for node in solved(shadow))
    yield from ((node, _VECTOR) for node in running_means(shadow))
    yield from ((node, _EXPONENTIAL) for node in _stabilised(shadow))


def _stabilised(shadow: Shadow) -> Iterator[Node]:
    """The last division of each recurrence: the maxima of the others lead to its own."""
    covered: set[Node] = set()
    for node, bound in reversed(list(stabilised(shadow))):
        if covered.isdisjoint(_above(bound)):
            yield node
        covered.update(before(shadow, node))


def _above(bound: Node) -> list[Node]:
    """The maximum that makes a bound, exp(-m)."""
    return [source for node in bound.all_input_nodes for source in node.all_input_nodes]


def after(shadow: Shadow, node: Node) -> Iterator[Node]:
    """The node and all that follows from it, up to the next layer with weights."""
    pending, seen = deque([node]), {node}
    while pending:
        at = pending.popleft()
        yield at
        if operation(at) == "linear" or (at is not node and _is_layer(shadow, at)):
            continue
        fresh = [user for user in (*shadow.users(at), *_readers(shadow, at)) if user not in seen]
        seen.update(fresh)
        pending.extend(fresh)


def before(shadow: Shadow, node: Node) -> Iterator[Node]:
    """All that the node follows from, writes in place included, down from the last layers with weights."""
    pending, seen = deque([node]), {node}
    while pending:
        at = pending.popleft()
        if (
            at.op != "call_function"
            or operation(at) == "linear"
            or (at is not node and _is_layer(shadow, at))
        ):
            continue
        yield at
        fresh = [source for source in (*at.all_input_nodes, *writes_after(at, None)) if source not in seen]
        seen.update(fresh)
        pending.extend(fresh)


def _readers(shadow: Shadow, write: Node) -> list[Node]:
    """What reads the matrix after a row was written into it."""
    return [n for n in shadow.users(base_of(write)) if write < n] if operation(write) == "copy" else []


def _is_layer(shadow: Shadow, node: Node) -> bool:
    form = product_of(node)
    return form is not None and any(is_weight(shadow, term) for term, _ in form.terms)


RULE = UnservedRule()
