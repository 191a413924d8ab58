"""The one comparison: row by row against fp64, in units of what eager loses in the same dtype.

A single ratio over the whole tensor hides a short row with a large error, or one lost tile among many heads;
so each row (the last dimension) is judged by itself:

    ||out - exact|| <= factor * max(||eager - exact||, 2^-p ||exact||)

with p the mantissa of the dtype, and the patterns of NaN, +Inf and -Inf must be the same.
"""

import torch
from torch import Tensor

#: Bits that one rounding leaves, per dtype.
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 20, torch.float64: 48}


def assert_same(
    out: Tensor, exact: Tensor, eager: Tensor | None = None, *, factor: float = 2.0, what: str = "out"
) -> None:
    """Fails unless every row of `out` is as close to `exact` (fp64) as the row rule asks.

    out, exact, eager: (..., D); `eager` is the plain torch result in the dtype of `out` (none: only the rounding
    of the dtype is allowed). `factor` is 2 for outputs and 3 for gradients.
    """
    assert out.shape == exact.shape, f"{what}: shape {tuple(out.shape)}, wanted {tuple(exact.shape)}"
    if out.numel() == 0:
        return
    got, want = out.detach().double().cpu(), exact.detach().double().cpu()
    _assert_same_specials(got, want.to(out.dtype).double(), what)
    error, allowed = _row_norm(got - want), _allowance(want, eager, BITS[out.dtype])
    excess = error / (factor * allowed).clamp_min(torch.finfo(torch.float64).tiny)
    worst = int(excess.argmax())
    assert excess.max() <= 1, (
        f"{what}: row {_unravel(worst, error.shape)} is off by {error.flatten()[worst]:.3e}, "
        f"{excess.max():.2f} times the allowance; {int((excess > 1).sum())} of {excess.numel()} rows are"
    )


def _assert_same_specials(got: Tensor, want: Tensor, what: str) -> None:
    for name, test in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
        differ = (test(got) != test(want)).sum()
        assert differ == 0, f"{what}: {name} pattern differs in {int(differ)} of {got.numel()} places"


def _allowance(want: Tensor, eager: Tensor | None, bits: int) -> Tensor:
    rounding = 2.0**-bits * _row_norm(want)
    if eager is None:
        return rounding
    return torch.maximum(rounding, _row_norm(eager.detach().double().cpu() - want))


def _row_norm(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0).norm(dim=-1)


def _unravel(index: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(index), shape))
