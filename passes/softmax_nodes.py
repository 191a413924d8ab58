"""Questions about the graph around a softmax: what lies between two nodes, what depends on what, what is the same."""

from collections.abc import Iterator

import torch
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

from attnopt.passes.constants import constant
from attnopt.passes.mask_writes import is_settled, writes_after
from attnopt.shadow import Shadow

#: More nodes than this are not compared one by one.
MOST = 300


def between(shadow: Shadow, top: Node, bottom: Node) -> frozenset[Node]:
    """Nodes computed from `top` on the way to `bottom`, which is one of them; `top` is not."""
    order = shadow.order
    below: set[Node] = {top}
    for node in _ordered_below(shadow, top, bottom):
        if any(n in below for n in node.all_input_nodes):
            below.add(node)
    needed, pending = {bottom}, [bottom]
    while pending:
        near = {n for n in pending.pop().all_input_nodes if n in below and order[n] > order[top]} - needed
        needed |= near
        pending.extend(near)
    return frozenset(needed - {top})


def _ordered_below(shadow: Shadow, top: Node, bottom: Node) -> Iterator[Node]:
    last = shadow.order[bottom]
    seen, pending = {top}, [top]
    while pending:
        near = {u for u in pending.pop().users if shadow.order[u] <= last} - seen
        seen |= near
        pending.extend(near)
    yield from sorted(seen - {top}, key=lambda n: shadow.order[n])


def depends_on(shadow: Shadow, node: Node, on: frozenset[Node] | set[Node]) -> bool:
    """Whether `node` is one of some nodes, or computed from one."""
    if not on:
        return False
    first = min(shadow.order[n] for n in on)
    seen, pending = {node}, [node]
    while pending:
        here = pending.pop()
        if here in on:
            return True
        near = {n for n in here.all_input_nodes if shadow.order[n] >= first} - seen
        seen |= near
        pending.extend(near)
    return False


def same_value(one: Node, other: Node) -> bool:
    """Whether two nodes compute the same from the same, by the same operations."""
    pending, seen = [(one, other)], set()
    while pending:
        a, b = pending.pop()
        if (a, b) in seen:
            continue
        seen.add((a, b))
        if (a is b and is_settled(a)) or _is_same_number(a, b):
            continue
        if a is b or not _is_repeatable(a) or not _is_repeatable(b) or a.target is not b.target:
            return False
        left, right = (pytree.tree_flatten((n.args, dict(n.kwargs))) for n in (a, b))
        if left[1] != right[1] or len(seen) > MOST:
            return False
        for x, y in zip(left[0], right[0], strict=True):
            if isinstance(x, Node) and isinstance(y, Node):
                pending.append((x, y))
            elif type(x) is not type(y) or x != y:
                return False
    return True


def _is_same_number(a: Node, b: Node) -> bool:
    value = constant(a)
    return value is not None and value == constant(b) and a.meta["val"].dtype == b.meta["val"].dtype


def _is_repeatable(node: Node) -> bool:
    """Whether a node would compute the same a second time, and nothing writes to what it made."""
    if not isinstance(node.target, OpOverload) or node.target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in node.target.tags and not writes_after(node, None)
