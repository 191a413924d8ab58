"""What reading the scores collects: the product, its scale, what is added, what is filled in, and how it is rounded."""

from dataclasses import dataclass

import torch
from torch.fx import Node

from attnopt.passes.contraction import Contraction
from attnopt.passes.layout import Axes, Dims


@dataclass(frozen=True, slots=True)
class Term:
    """A tensor added to the logits (times `factor`), or multiplied onto the scores (`inverse`: it divides them)."""

    node: Node
    dims: Dims
    factor: float = 1.0
    inverse: bool = False
    casts: "tuple[Cast, ...]" = ()


@dataclass(frozen=True, slots=True)
class Cast:
    """The scores are cast to `dtype`, and multiplied by `scale` afterwards."""

    dtype: torch.dtype
    scale: float


def held_as(value: float, casts: "tuple[Cast, ...]") -> float:
    """A hidden logit, given as it would be without rounding, behind the casts: -inf if it does not fit one of them."""
    held = (
        torch.tensor(value / cast.scale, dtype=torch.float64).to(cast.dtype)
        for cast in casts
        if cast.scale > 0
    )
    return -torch.inf if any(x == -torch.inf for x in held) else value


@dataclass(frozen=True, slots=True)
class Fill:
    """A condition under which a score, held in `dtype`, becomes `value`; `hides`: whether that is where it is True."""

    node: Node
    dims: Dims
    value: float
    hides: bool
    dtype: torch.dtype = torch.float32
    casts: tuple[Cast, ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """logits = scale * (q k^T) * factors + terms, after fills.

    rsqrt: axes by the square root of whose length the scores are divided. form: the contraction. path: nodes between.
    """

    scale: float = 1.0
    softcap: float | None = None
    terms: tuple[Term, ...] = ()
    fills: tuple[Fill, ...] = ()
    factors: tuple[Term, ...] = ()
    casts: tuple[Cast, ...] = ()
    path: tuple[Node, ...] = ()
    rsqrt: Axes = ()
    form: Contraction | None = None
    q: Dims = ()
    k: Dims = ()
