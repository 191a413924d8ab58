"""One token of linear attention on Triton: the state is read once, decayed, added to, written, and multiplied by q."""

import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels._triton import (
    await_launch,
    can_overlap,
    fetch_ahead,
    next_power_of_two,
    offset,
    on_device_of,
)
from attnopt.kernels.lightning.blocks import LEAST_LOG_DECAY, LOG2E
from attnopt.kernels.lightning.triton_decay import decay_factor

_LEAST = tl.constexpr(LEAST_LOG_DECAY)
_LOG2E = tl.constexpr(LOG2E)

#: Warps of a program, with 128 registers of state a thread: many loads on their way (docs/perf-log.md).
WARPS = 2

#: Below so many heads a launch is short beside its start: its states are fetched before the launch in front has ended.
FEW = 132


@triton.jit
def _step_kernel(
    q_ptr, q_sb, q_sh, q_sd,
    k_ptr, k_sb, k_sh, k_sd,
    v_ptr, v_sb, v_sh, v_sd,
    state_ptr, state_sb, state_sh, state_sk, state_sv,
    decay_ptr, decay_sb, decay_sh,
    out_ptr, scale, H, share, slices,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, NEAR: tl.constexpr,
    OVERLAP: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """NEAR: a head's state spans less than 2^31 elements, so that its cells are addressed in 32 bits."""
    pid = tl.program_id(0)
    bh = pid // slices
    b = bh // H
    h = bh % H
    d = tl.arange(0, BLOCK_D)
    dv = (pid % slices) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (d < D)[:, None] & (dv < DV)[None, :]
    state_at = state_ptr + offset(b, state_sb) + offset(h, state_sh)
    if AHEAD:
        LINES: tl.constexpr = (BLOCK_V + 31) // 32
        line = (pid % slices) * BLOCK_V + tl.arange(0, LINES) * 32
        fetch_ahead(
            state_at + offset(tl.minimum(d, D - 1), state_sk)[:, None] + tl.minimum(line, DV - 1)[None, :]
        )
    await_launch(OVERLAP)
    q_at = q_ptr + offset(b, q_sb) + offset(h, q_sh) + offset(d, q_sd)
    k_at = k_ptr + offset(b, k_sb) + offset(h // share, k_sh) + offset(d, k_sd)
    v_at = v_ptr + offset(b, v_sb) + offset(h // share, v_sh) + offset(dv, v_sd)
    q = tl.load(q_at, mask=d < D, other=0.0).to(tl.float32) * scale
    k = tl.load(k_at, mask=d < D, other=0.0).to(tl.float32)
    v = tl.load(v_at, mask=dv < DV, other=0.0).to(tl.float32)
    if NEAR:
        state_at = state_at + (d * state_sk)[:, None] + (dv * state_sv)[None, :]
    else:
        state_at = state_at + offset(d, state_sk)[:, None] + offset(dv, state_sv)[None, :]
    state = tl.load(state_at, mask=inside, other=0.0, eviction_policy="evict_first")
    if decay_ptr is not None:
        g = tl.load(decay_ptr + offset(b, decay_sb) + offset(h, decay_sh)).to(tl.float32)
        g = tl.maximum(g, _LEAST, propagate_nan=tl.PropagateNan.ALL)
        state = state * decay_factor(g * _LOG2E, tl.float32)
    state += k[:, None] * v[None, :]
    tl.store(state_at, state, mask=inside, eviction_policy="evict_first")
    out = tl.sum(q[:, None] * state, axis=0)
    tl.store(out_ptr + offset(bh, DV) + dv, out.to(out_ptr.dtype.element_ty), mask=dv < DV)


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
    """Updates `state` in place and returns o; shapes as in `chunked.step`, no dimension 0, any strides."""
    batch, heads, dim = q.shape
    out = q.new_empty(batch, heads, v.shape[2])
    columns = min(next_power_of_two(v.shape[2]), _columns(dim))
    slices, overlap = triton.cdiv(v.shape[2], columns), can_overlap(state)
    ahead = overlap and batch * heads < FEW and state.stride(3) == 1
    with on_device_of(q):
        _step_kernel[(batch * heads * slices,)](
            q, *q.stride(), k, *k.stride(), v, *v.stride(), state, *state.stride(),
            log_decay, *_decay_strides(log_decay), out, scale, heads, heads // k.shape[1], slices,
            D=dim, DV=v.shape[2], BLOCK_D=next_power_of_two(dim), BLOCK_V=columns, NEAR=_is_near(state),
            OVERLAP=overlap, AHEAD=ahead, launch_pdl=overlap, num_warps=WARPS,
        )  # fmt: skip
    return out


def _columns(dim: int) -> int:
    """State columns per program: 8,192 cells."""
    return max(16, 8192 // next_power_of_two(dim))


def _is_near(state: Tensor) -> bool:
    rows, columns = (next_power_of_two(size) for size in state.shape[2:])
    return rows * abs(state.stride(2)) + columns * abs(state.stride(3)) < 2**31


def _decay_strides(log_decay: Tensor | None) -> tuple[int, int]:
    if log_decay is None:
        return 0, 0
    return (0, log_decay.stride(0)) if log_decay.dim() == 1 else (log_decay.stride(0), log_decay.stride(1))
