"""Decays that dropout sets to 0 in places, before the program takes their logarithm: -inf, and NaN at no distance."""

from collections.abc import Iterator

from torch import Tensor
from torch.fx import Node

from attnopt.passes.layout import dropout_rate
from attnopt.passes.mask_writes import operation

#: Views, casts, products and sums: what is 0 or -inf before them may be so after them.
_SCALES = frozenset(
    {
        "mul", "div", "neg", "view", "reshape", "unsqueeze", "squeeze", "expand", "permute", "transpose", "mT", "t",
        "slice", "select", "unflatten", "flatten", "clone", "contiguous", "to", "_to_copy", "cumsum", "sub", "add",
    }
)  # fmt: skip


def is_dropped(decay: Node) -> bool:
    """Whether the logarithm is taken of something that dropout sets to 0 in places."""
    logs = [node for node in _upwards(decay) if operation(node) == "log"]
    return any(_drops(node) for log in logs for node in _upwards(*log.all_input_nodes))


def _drops(node: Node) -> bool:
    return operation(node) == "dropout" and dropout_rate(node) > 0


def _upwards(*starts: Node) -> Iterator[Node]:
    """What a tensor is made of, up to the first operation that is none of these, and that one."""
    pending, seen = list(starts), set(starts)
    while pending:
        here = pending.pop()
        yield here
        if operation(here) in _SCALES:
            above = {n for n in here.all_input_nodes if isinstance(n.meta.get("val"), Tensor)} - seen
            seen |= above
            pending.extend(above)
