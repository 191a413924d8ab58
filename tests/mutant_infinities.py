"""What may stand in a result where eager's is infinite or NaN. What is finite in eager is never judged here.

Plainly the same must stand there: NaN for NaN, +Inf for +Inf, -Inf for -Inf. Two things widen that, both narrowly:

- `any_kind`, of linear attention: another of the three. An infinite query makes its row infinite where eager adds one
  product, and NaN where a kernel also multiplies it by an empty state (inf * 0). No element becomes finite by it, and
  none ceases to be.
- `wide`: the same program where whole numbers become fp64, not fp32, as they turn into floats. What fp32 alone has made
  infinite, as exp(100) does, is known then; a result may have that number instead, within its tolerance. In linear
  attention casts to fp16 become fp64, too: kernels compute the weights anew, which overflow past 65,504. Not so in
  softmax, where the lowest number of fp32 that is cast to fp16 is a mask of -Inf.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map


@dataclass(frozen=True)
class Beyond:
    """any_kind: whether NaN, +Inf and -Inf may stand for one another. wide: results of the program in fp64."""

    any_kind: bool = False
    wide: tuple[Tensor, ...] = ()


#: NaN for NaN, and so on.
STRICT = Beyond()


@contextmanager
def in_double() -> Iterator[None]:
    """Whole numbers become fp64 where they turn into floats."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def without_half(module: GraphModule) -> GraphModule:
    """A copy in which fp64 stands for each fp16 that the graph names."""
    wider = copy.deepcopy(module)
    for node in wider.graph.nodes:
        node.args, node.kwargs = tree_map(
            lambda x: torch.float64 if x is torch.float16 else x, (node.args, node.kwargs)
        )
    wider.recompile()
    return wider


def recovered(out: Tensor, want: Tensor, number: int, beyond: Beyond) -> tuple[Tensor, Tensor]:
    """Elements that are finite in `out` though not in `want`, and what they should be then; 0 elsewhere, and in both.

    Where nothing is known of them they should be 0 and are not: see `differing`, which counts them.
    """
    at = _recovered(out, want, number, beyond)
    wide = beyond.wide[number].to(out.dtype) if number < len(beyond.wide) else torch.zeros_like(out)
    return out.where(at, 0.0), wide.where(at, 0.0)


def differing(out: Tensor, want: Tensor, number: int, beyond: Beyond = STRICT) -> str:
    """What is infinite or NaN otherwise than it may be, "" for nothing."""
    judged = ~_recovered(out, want, number, beyond)
    if beyond.any_kind:
        kinds = {"not finite": lambda x: ~x.isfinite()}
    else:
        kinds = {"NaN": torch.isnan, "+Inf": torch.isposinf, "-Inf": torch.isneginf}
    for name, test in kinds.items():
        found, wanted = test(out) & judged, test(want) & judged
        if not torch.equal(found, wanted):
            return f"result {number}: {int(found.sum())} {name}, wanted {int(wanted.sum())}"
    return ""


def _recovered(out: Tensor, want: Tensor, number: int, beyond: Beyond) -> Tensor:
    if number >= len(beyond.wide) or beyond.wide[number].shape != out.shape:
        return torch.zeros_like(out, dtype=torch.bool)
    return out.isfinite() & ~want.isfinite() & beyond.wide[number].isfinite()
