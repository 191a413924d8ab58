"""torch's scan(), which calls its body once for each position, as the loop that it stands for.

The shadow is traced through the loop, so that a recurrence is read as if Python had unrolled it. Where it is rewritten,
the scan gives way to the call; everywhere else it stays. A scan whose length is not known while compiling, or that is
too long, is named and left alone.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from attnopt.passes.linear_product import product_of
from attnopt.passes.mask_writes import operation
from attnopt.passes.reroll_cut import BUDGET
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow

scan = torch.ops.higher_order.scan

#: What a body that holds more than one step of a recurrence calls: it is read by itself, as a body.
_WHOLE = ("softmax", "attention", "norm", "linear", "conv")
#: What a body calls, one of them at least, that multiplies a state with queries.
_SUMMED = ("einsum", "matmul", "mm", "mv", "sum", "dot")


def unrolled(
    body: GraphModule, start: Sequence[Tensor], given: Sequence[Tensor], shared: Sequence[Any] = ()
) -> list[Tensor]:
    """scan(body, start, given): the last carried values, and what each step made, stacked along dimension 0.

    body: carried values, one position of each tensor in `given`, and `shared` -> carried values, what the step makes.
    """
    carried, made = list(start), []
    for step in range(given[0].shape[0]):
        out = list(body(*carried, *(x[step] for x in given), *shared))
        carried = out[: len(carried)]
        made.append(out[len(carried) :])
    return [*carried, *(torch.stack(column) for column in zip(*made, strict=True))]


def _is_short(body: Any, start: Any, given: Sequence[Tensor], shared: Any = ()) -> bool:
    """Whether the loop has a known length, within the budget of those that are read, and plain steps."""
    del start, shared
    steps = given[0].shape[0] if given else 0
    if not isinstance(body, GraphModule) or not isinstance(steps, int) or steps < 1:
        return False
    calls = [_called(node) for node in _calls(body)]
    sums = any(part in name for name in calls for part in _SUMMED)
    return steps * len(body.graph.nodes) <= BUDGET and sums and not any(map(_is_whole, _calls(body)))


def _calls(body: GraphModule) -> Iterator[Node]:
    yield from (node for node in body.graph.nodes if node.op not in ("placeholder", "output"))


def _is_whole(node: Node) -> bool:
    return node.op in ("get_attr", "call_module") or any(part in _called(node) for part in _WHOLE)


def _called(node: Node) -> str:
    return str(getattr(node.target, "__name__", node.target))


class ScanRule:
    """Scans that were not spelled out and carry the state of a linear attention."""

    name = "linear scan"
    anchors = frozenset({scan})

    def read(self, anchor: Node, shadow: Shadow) -> Site:
        """Never a site. Raises Reject, of depth -1 where no such state is carried."""
        body, start = anchor.args[:2]
        held = getattr(shadow.module, str(body.target), None) if isinstance(body, Node) else None
        if not isinstance(held, GraphModule) or not _carries_state(held, len(start)):  # type: ignore[arg-type]
            raise Reject("the scan carries no state that keys and values are added to", anchor, -1)
        raise Reject(
            "a recurrence in scan() is read where its length is known while compiling and its steps have no more than "
            f"{BUDGET} operations in all; compile it with dynamic=False, a shorter one, or one in chunks",
            anchor,
            1,
        )


def _carries_state(body: GraphModule, carried: int) -> bool:
    """Whether a carried value is added to, and then multiplied with something and summed."""
    inner = [n for n in body.graph.nodes if n.op == "placeholder"]
    results = next(iter(body.graph.find_nodes(op="output"))).args[0]
    for old, new in zip(inner[:carried], results, strict=False):
        summed = isinstance(new, Node) and operation(new) == "add" and old in _above(new)
        if summed and any(product_of(n) is not None and new in _above(n) for n in body.graph.nodes):
            return True
    return False


def _above(node: Node) -> set[Node]:
    seen: set[Node] = set()
    pending = deque([node])
    while pending:
        fresh = set(pending.popleft().all_input_nodes) - seen
        seen |= fresh
        pending.extend(fresh)
    return seen


#: Operator -> when it may be spelled out, and how.
EXPANSIONS = {scan: (_is_short, unrolled)}

RULE = ScanRule()
