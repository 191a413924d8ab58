"""Writes to the memory of an unrolled loop by operations that are no part of it, such as relu_ of a view of a decay.

A loop is cut out of a graph by following values upwards. What changes them in between under another name is met only
where it is arithmetic: whatever else it is, it must lie before all that the loop makes of that memory, or behind the
loop.
"""

from collections.abc import Iterable, Iterator

from torch.fx import Node

from attnopt.passes.mask_writes import sharing, targets
from attnopt.passes.reroll_cut import Region
from attnopt.passes.reroll_facts import storage
from attnopt.rule import Reject


def check_writes(region: Region, beside: Iterable[Node], depth: int) -> None:
    """Raises Reject, of that depth, where something else writes to memory between two uses of it by the loop.

    beside: nodes that are not computed in the loop, and must hold the same throughout.
    """
    inside = {*region.nodes}
    end = max(region.nodes)
    for first in _first_of_each_memory((*region.nodes, *beside)):
        late = next((w for w in _writers(first) if first < w < end and w not in inside), None)
        if late is not None:
            raise Reject(
                f"an inner value of a loop over positions ({first.name}) is written to in place by {late.name}, "
                "which is no part of linear attention; leave the write out, or let it write to a copy",
                late,
                depth,
            )


def _first_of_each_memory(nodes: Iterable[Node]) -> Iterator[Node]:
    met: set[int | None] = {None}
    for node in sorted(nodes):
        if (memory := storage(node)) not in met:
            met.add(memory)
            yield node


def _writers(node: Node) -> Iterator[Node]:
    for alias in sharing(node):
        yield from (user for user in alias.users if alias in targets(user))
