"""Run-time checks behind tables of decays that came into a graph as buffers: where they fail the graph as it was runs.

A buffer is compared with its formula when it is another tensor than the last time, or was written to since.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from attnopt.pipeline import Edit
from attnopt.rule import Assumed

#: So many pairs of tensors are remembered: layers that share compiled code.
REMEMBERED = 256

#: A tensor as it was: where its elements lie, how often it had been written to, its memory (kept, so that no other
#: tensor gets the same address), and how it was laid out.
Seen = tuple[int, int, Any, tuple[int, ...], tuple[int, ...]]


@dataclass(slots=True)
class Premise:
    """The argument at `place` holds what `assumed` says of the one at `base`. seen: pairs that were found to do so."""

    place: int
    base: int
    assumed: Assumed
    seen: dict[tuple[int, int], tuple[Seen, Seen]] = field(default_factory=dict)

    def holds(self, args: Sequence[Any]) -> bool:
        """Whether it does."""
        given, base = args[self.place], args[self.base]
        if (
            not isinstance(given, Tensor)
            or not isinstance(base, Tensor)
            or given.is_inference()
            or base.is_inference()
        ):
            return False
        key, now = (given.data_ptr(), base.data_ptr()), (_seen(given), _seen(base))
        known = self.seen.get(key)
        if known is not None and _same(known[0], now[0]) and _same(known[1], now[1]):
            return True
        if given.requires_grad or base.requires_grad or not self.assumed.holds(given, base):
            return False
        if len(self.seen) >= REMEMBERED:
            self.seen.clear()
        self.seen[key] = now
        return True


def _seen(value: Tensor) -> Seen:
    return value.data_ptr(), value._version, value.untyped_storage(), tuple(value.shape), value.stride()


def _same(a: Seen, b: Seen) -> bool:
    return (*a[:2], *a[3:]) == (*b[:2], *b[3:])


def premises(module: GraphModule, edits: Sequence[Edit]) -> list[Premise]:
    """What the edits took for granted of the inputs of `module`."""
    place = {node: n for n, node in enumerate(m for m in module.graph.nodes if m.op == "placeholder")}
    pairs = [
        (edit.shadow.value_of[node], edit.shadow.value_of[assumed.base], assumed)
        for edit in edits
        for node, assumed in edit.site.assumed.items()
    ]
    return [Premise(place[node], place[base], assumed) for node, base, assumed in pairs]
