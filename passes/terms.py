"""What reading the scores collects: the product, its scale, what is added, what is filled in, and how it is rounded."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from attnopt.passes.contraction import Contraction
from attnopt.passes.layout import Axes, Dims


@dataclass(frozen=True, slots=True)
class Cast:
    """The scores are cast to `dtype`, and multiplied by `scale` afterwards."""

    dtype: torch.dtype
    scale: float

    def hold(self, value: float) -> float:
        """A logit, given as it would be without the cast: infinite if `dtype` does not reach so far."""
        held = torch.tensor(value / self.scale, dtype=torch.float64).to(self.dtype)
        return value if held.isfinite() else float(held)


@dataclass(frozen=True, slots=True)
class Floor:
    """Scores below `value` are raised to it, and multiplied by `scale` afterwards.

    halves: where a score is equal to it, only half of the gradient passes.
    """

    value: float
    scale: float
    halves: bool = False

    def hold(self, value: float) -> float:
        """A logit, given as it would be without the floor."""
        return max(value, self.value * self.scale)


#: A finite fill at or below this leaves a weight of exactly 0 beside any visible key.
NEGLIGIBLE = -1e9

#: What happens to a logit between where it is filled in, or added, and the softmax; the last to happen comes first.
Holds = tuple[Cast | Floor, ...]


def held_as(value: float, holds: Holds) -> float:
    """A hidden logit, given as it would be without rounding, behind the casts and floors."""
    for hold in reversed(holds):
        if hold.scale > 0:
            value = hold.hold(value)
    return value


def floors(holds: Holds) -> list[float]:
    """The least logits that the floors leave, with the one that acts last in front."""
    return [hold.value * hold.scale for hold in holds if isinstance(hold, Floor)]


def narrowest(holds: Holds, held: torch.dtype) -> torch.dtype:
    """The type with the shortest range among `held` and those that the scores are cast to."""
    dtypes = [held, *(hold.dtype for hold in holds if isinstance(hold, Cast))]
    return min(dtypes, key=lambda dtype: torch.finfo(dtype).max)


@dataclass(frozen=True, slots=True)
class Term:
    """A tensor added to the logits (times `factor`), or multiplied onto the scores (`inverse`: it divides them).

    times: tensors that multiply what is added. casts: what happens to the sum afterwards. tops: axes along which an
    added tensor is the largest of the very logits it is added to. at: the node that reads it.
    """

    node: Node
    dims: Dims
    factor: float = 1.0
    inverse: bool = False
    casts: Holds = ()
    times: "tuple[Term, ...]" = ()
    tops: Axes = ()
    at: Node | None = None


@dataclass(frozen=True, slots=True)
class Blocked:
    """A term that is added to a block: outer, inner: labels of all logits, and of the block.

    pads: how many logits of each dimension stand before the block and behind it.
    """

    term: Term
    outer: Dims
    inner: Dims
    pads: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Fill:
    """A condition under which a score, held in `dtype`, becomes `value`.

    hides: whether that is where it is True. casts: what happens to the score afterwards. at: the node that reads it.
    """

    node: Node
    dims: Dims
    value: float
    hides: bool
    dtype: torch.dtype = torch.float32
    casts: Holds = ()
    at: Node | None = None


@dataclass(frozen=True, slots=True)
class Scores:
    """logits = scale * (q k^T) * factors + terms, after fills.

    rsqrt: axes by the square root of whose length the scores are divided. form: the contraction. path: nodes between.
    blocks: what is added to a part of the logits.
    shift: the sum of the numbers that are added to all logits, of which a softmax without sinks takes no notice.
    """

    scale: float = 1.0
    softcap: float | None = None
    terms: tuple[Term, ...] = ()
    fills: tuple[Fill, ...] = ()
    factors: tuple[Term, ...] = ()
    casts: Holds = ()
    path: tuple[Node, ...] = ()
    rsqrt: Axes = ()
    shift: float = 0.0
    form: Contraction | None = None
    q: Dims = ()
    k: Dims = ()
    blocks: tuple[Blocked, ...] = ()
