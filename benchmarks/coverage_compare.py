"""Compares a whole model's results with eager's, fp64 being the arbiter (docs/decisions.md, 11).

Through many layers eager is by luck near fp64 in some rows, so a whole model is judged by its worst and its median row,
each at most FACTOR times eager's, or the rounding of the dtype at the size of the largest row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 4.0
#: Bits that one rounding leaves: tests/oracle.py's, for whole models.
BITS: Mapping[torch.dtype, int] = {torch.bfloat16: 7, torch.float32: 19}


@dataclass(frozen=True, slots=True)
class Result:
    """The outputs of a forward, and the gradients of the parameters by name."""

    outputs: Sequence[Tensor]
    gradients: Mapping[str, Tensor]


def differences(got: Result, eager: Result, exact: Result | None, dtype: torch.dtype) -> list[str]:
    """What differs, one sentence each; [] if nothing does."""
    exact = exact or eager
    if len(got.outputs) != len(eager.outputs):
        return [f"{len(got.outputs)} outputs, eager gives {len(eager.outputs)}"]
    if got.gradients.keys() != eager.gradients.keys():
        return [f"gradients of {sorted(got.gradients.keys() ^ eager.gradients.keys())[:3]} are there or not"]
    named = {
        f"output {n}": given
        for n, given in enumerate(zip(got.outputs, eager.outputs, exact.outputs, strict=True))
    }
    for name, gradient in got.gradients.items():
        plain = eager.gradients[name]
        named[f"gradient of {name}"] = (gradient, plain, exact.gradients.get(name, plain))
    found = (_difference(*given, bits=BITS[dtype]) for given in named.values())
    return [f"{name} {what}" for name, what in zip(named, found, strict=True) if what]


def _difference(got: Tensor, eager: Tensor, exact: Tensor, *, bits: int) -> str:
    if got.shape != eager.shape:
        return f"has shape {tuple(got.shape)}, eager's {tuple(eager.shape)}"
    if got.dtype != eager.dtype:
        return f"is {got.dtype}, eager's {eager.dtype}"
    got, eager, exact = (x.detach().double() for x in (got, eager, exact))
    for test in (torch.isnan, torch.isposinf, torch.isneginf):
        if bool((test(got) != test(eager)).any()):
            return f"has {test.__name__} in {int(test(got).sum())} places, eager in {int(test(eager).sum())}"
    known = eager.isfinite() & exact.isfinite()
    got, eager, exact = (_rows(x.where(known, 0.0)) for x in (got, eager, exact))
    error, allowed = (got - exact).norm(dim=-1), (eager - exact).norm(dim=-1)
    floor = 2.0**-bits * float(exact.norm(dim=-1).max()) if exact.numel() else 0.0
    for name, pick in (("worst", torch.max), ("median", torch.median)):
        mine, its = (float(pick(x)) if x.numel() else 0.0 for x in (error, allowed))
        if mine > FACTOR * max(its, floor):
            largest = float(exact.norm(dim=-1).max())
            return f"is off by {mine:.1e} in the {name} row, eager by {its:.1e}, rows up to {largest:.1e}"
    return ""


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)
