"""Compares a whole model's results with eager's, fp64 being the arbiter (docs/decisions.md, 11).

Through many layers eager is by luck near fp64 in some rows, so a whole model is judged by its worst and its median row,
each at most FACTOR times eager's, or the rounding of the dtype at the size of the largest row. A single run of eager is
one draw of its roundings, and may be lucky as well (a gradient of one number; one that vanishes by symmetry). So what
fails is a suspect, and is wrong unless both hold, with no other constants:

1. The rewritten program run in fp64 equals eager's in fp64, up to FACTOR times the worst of DRAWS runs of eager in
   fp64, each with the roundings of its products, softmaxes and running sums drawn anew (coverage_rounding.py), or the
   rounding of fp64 as above. An error in the mathematics has the same size in fp64 and fails this, however small beside
   fp32's rounding. What eager's roundings do is measured in fp64, not scaled from the dtype to there: a bf16 model
   computes in fp32 what loses most, so that its error times eps(fp64) / eps(bf16) is far below fp64's.
2. In its own dtype it is off by at most FACTOR times the worst of DRAWS such runs in that dtype.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR, DRAWS = 4.0, 8
#: Bits that one rounding leaves: tests/oracle.py's, for whole models.
BITS: Mapping[torch.dtype, int] = {torch.bfloat16: 7, torch.float32: 19, torch.float64: 48}


@dataclass(frozen=True, slots=True)
class Result:
    """The outputs of a forward, and the gradients of the parameters by name."""

    outputs: Sequence[Tensor]
    gradients: Mapping[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """All of it, by the name that a report gives it."""
        outputs = {f"output {n}": x for n, x in enumerate(self.outputs)}
        return outputs | {f"gradient of {name}": x for name, x in self.gradients.items()}


def differences(got: Result, draws: Sequence[Result], exact: Result | None, dtype: torch.dtype) -> list[str]:
    """What differs, one sentence each; [] if nothing does.

    draws: runs of eager, the first with its own roundings. exact: in fp64; none: the first run is the arbiter.
    """
    eager = draws[0]
    wanted = (exact or eager).named()
    if len(got.outputs) != len(eager.outputs):
        return [f"{len(got.outputs)} outputs, eager gives {len(eager.outputs)}"]
    if got.gradients.keys() != eager.gradients.keys():
        return [f"gradients of {sorted(got.gradients.keys() ^ eager.gradients.keys())[:3]} are there or not"]
    others = [draw.named() for draw in draws]
    found = {
        name: _mismatch(x, others[0][name])
        or _difference(x, [o[name] for o in others], wanted.get(name, others[0][name]), BITS[dtype])
        for name, x in got.named().items()
    }
    return [f"{name} {what}" for name, what in found.items() if what]


def disproof(got: Result, exact: Result, draws: Sequence[Result]) -> list[str]:
    """Where the rewritten program run in fp64 is not eager's run in fp64, `exact`; draws: eager in fp64, redrawn."""
    wanted, others = exact.named(), [draw.named() for draw in (exact, *draws)]
    if any(other.keys() != wanted.keys() for other in (got.named(), *others)):
        return ["other outputs or gradients in fp64"]
    found = {
        name: _mismatch(x, wanted[name])
        or _difference(x, [o[name] for o in others], wanted[name], BITS[torch.float64])
        for name, x in got.named().items()
    }
    return [f"{name} in fp64 {what}" for name, what in found.items() if what]


def _mismatch(got: Tensor, eager: Tensor) -> str:
    if got.shape != eager.shape:
        return f"has shape {tuple(got.shape)}, eager's {tuple(eager.shape)}"
    if got.dtype != eager.dtype:
        return f"is {got.dtype}, eager's {eager.dtype}"
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        if bool((test(got) != test(eager)).any()):
            return f"has {test.__name__} in {int(test(got).sum())} places, eager in {int(test(eager).sum())}"
    return ""


def _difference(got: Tensor, draws: Sequence[Tensor], exact: Tensor, bits: int) -> str:
    known = exact.isfinite() & draws[0].isfinite() & got.isfinite()
    exact = exact.detach().double()
    error, *others = ((x.double() - exact).where(known & x.isfinite(), 0.0) for x in (got, *draws))
    largest = _largest(_rows(exact.where(known, 0.0)).norm(dim=-1))
    for name, pick in (("worst", _largest), ("median", _middle)):
        mine, *its = (pick(_rows(x).norm(dim=-1)) for x in (error, *others))
        allowed = max(its)
        if mine > FACTOR * max(allowed, 2.0**-bits * largest):
            return f"is off by {mine:.1e} in the {name} row, eager by {allowed:.1e}, rows up to {largest:.1e}"
    return ""


def _largest(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _middle(x: Tensor) -> float:
    return float(x.median()) if x.numel() else 0.0


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
