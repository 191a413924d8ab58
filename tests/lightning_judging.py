"""Linear attention judged row by row against fp64: what the tests of its Triton kernels share."""

import math
from collections.abc import Callable, Iterable

import torch
from lightning_cases import Case, Result, gradients, make_case, quadratic, recurrence
from oracle import assert_same
from torch import Tensor
from triton.errors import TritonError

from attnopt.kernels.lightning import triton_backward, triton_forward, triton_step
from attnopt.kernels.lightning.op import lightning_attention
from attnopt.kernels.lightning.triton_tiles import Tiles

Compute = Callable[[Case], Result]

#: Below it the parts of a sum may be subnormal in fp32, which have fewer bits, or none.
FAINT = torch.finfo(torch.float32).tiny * 2.0**8


def attend(case: Case) -> Result:
    """The public function; in fp64 it takes the torch path."""
    return lightning_attention(
        case.q, case.k, case.v,
        log_decay=case.log_decay, scale=case.scale, initial_state=case.initial_state, return_state=True,
    )  # fmt: skip


def forward(case: Case, tiles: Tiles | None = None) -> Result:
    """The Triton forward itself, also where the op would not take it."""
    return triton_forward.forward(
        case.q, case.k, case.v, case.log_decay, case.initial_state, case.scale, tiles=tiles
    )  # fmt: skip


def backward(case: Case, tiles: Tiles | None = None, *, with_log_decay: bool = True) -> dict[str, Tensor]:
    """The Triton gradients by name, that of a decay if asked for; that of a decay per head summed as the op does it."""
    with_log_decay = with_log_decay and case.log_decay is not None
    g = triton_backward.backward(
        case.d_out, case.d_state, case.q, case.k, case.v, case.log_decay, case.initial_state, case.scale,
        with_log_decay=with_log_decay, tiles=tiles,
    )  # fmt: skip
    found = {"q": g.q, "k": g.k, "v": g.v, "initial_state": g.initial_state}
    if with_log_decay:
        found["log_decay"] = g.log_decay.sum((0, 2)) if case.log_decay.dim() == 1 else g.log_decay
    return {name: x for name, x in found.items() if getattr(case, name) is not None}


def token(case: Case, t: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v of one token."""
    return case.q[:, :, t], case.k[:, :, t], case.v[:, :, t]


def decay_of(case: Case, t: int) -> Tensor | None:
    """The log decay of one token."""
    per_token = case.log_decay is not None and case.log_decay.dim() == 3
    return case.log_decay[:, :, t] if per_token else case.log_decay


def steps(case: Case, state: Tensor) -> Tensor:
    """All tokens one by one through the Triton step; `state` is updated."""
    found = (
        triton_step.step(*token(case, t), state, decay_of(case, t), case.scale)
        for t in range(case.q.shape[2])
    )
    return torch.stack(list(found), dim=2)


def assert_rows(
    got: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype, factor: float, what: str
) -> None:
    """The row rule in units of `dtype`, also where the result is fp32, as states are; scaled into its range.

    Rows that fp32 has no whole numbers for, such as exp(-100), are to be as small, and no more: a number of two of its
    least bits is off by half as it is.
    """
    if exact.numel() == 0:
        return assert_same(got, exact, what=what)
    exact, got, eager = (x.double().cpu() for x in (exact, got, eager))
    faint = exact.abs().amax(-1, keepdim=True) < FAINT
    assert got.masked_fill(~faint, 0.0).abs().max() < 2 * FAINT, (
        f"{what}: a row that fades out altogether is still there"
    )
    exact, got, eager = (x.masked_fill(faint, 0.0) for x in (exact, got, eager))
    unit = 2.0 ** math.ceil(math.log2(exact.abs().max().item() or 1.0))
    low, yardstick = ((x / unit).to(dtype) for x in (got, eager))
    return assert_same(low, exact / unit, yardstick, factor=factor, what=what)


def assert_forward(case: Case, device: str, dtype: torch.dtype, tiles: Tiles | None = None) -> None:
    """The Triton forward against the recurrence."""
    low = case.in_rounded(dtype)
    got, eager = forward(low.on(device), tiles), quadratic(low)
    exact = recurrence(low.map(Tensor.double))
    for what, *x in zip(("out", "state"), got, exact, eager, strict=True):
        assert_rows(*x, dtype, 2.0, what)


def assert_backward(case: Case, device: str, dtype: torch.dtype, tiles: Tiles | None = None) -> None:
    """The Triton gradients against those of the recurrence."""
    low = case.in_rounded(dtype)
    got, eager = backward(low.on(device), tiles), gradients(quadratic, low)
    for name, exact in gradients(recurrence, low.map(Tensor.double)).items():
        assert_rows(got[name], exact, eager[name], dtype, 3.0, f"d_{name}")


def results(compute: Compute, case: Case) -> dict[str, Tensor]:
    """Output, state and every gradient, by name."""
    out, state = compute(case)
    found = gradients(compute, case)
    return {"out": out, "state": state, **{f"d_{name}": x for name, x in found.items()}}


def plainly(case: Case) -> Result:
    """What eager makes of a case, without products that an empty sequence does not have."""
    return quadratic(case) if case.q.shape[2] else recurrence(case)


def faults(
    cases: Iterable[tuple[str, Case]],
    dtype: torch.dtype,
    *,
    laid: Callable[[Case], Case] = lambda case: case,
    compute: Compute = attend,
    eager: Compute = plainly,
) -> list[str]:
    """What is wrong with the op on each case, by row, against the op in fp64; an error of one case stops no other.

    `laid` puts the operands of the op somewhere else in memory.
    """
    found = []
    for name, case in cases:
        low = case.in_rounded(dtype)
        try:
            got = results(compute, laid(low))
            exact, yardstick = results(compute, low.map(Tensor.double)), results(eager, low)
        except (RuntimeError, ValueError, TypeError, TritonError) as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
            continue
        found += [f"{name}: {fault}" for fault in _row_faults(got, exact, yardstick, dtype)]
    return found


def _row_faults(
    got: dict[str, Tensor], exact: dict[str, Tensor], eager: dict[str, Tensor], dtype: torch.dtype
) -> list[str]:
    found = []
    for what, want in exact.items():
        try:
            assert_rows(got[what], want, eager[what], dtype, 3.0 if what.startswith("d_") else 2.0, what)
        except AssertionError as error:
            found.append(str(error))
    return found


def small_case(length: int, **changes: object) -> Case:
    """One key/value head for two query heads; nothing cancels, so that the row rule is sharp."""
    return make_case(length, **{"batch": 1, "signed": False, **changes})
