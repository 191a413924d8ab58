"""One causal sweep of decayed linear attention in Triton; the forward and all three gradients are such sweeps.

    forward:  out_t = sum over s <= t of scale * exp(G_t - G_s) (x_t . y_s) z_s  +  what an initial state adds
    reverse:  the same with s >= t and exp(G_s - G_t)

Lightning Attention-2 (arXiv 2401.04658) in two levels: a program walks the chunks of one segment with the state, a
(D, slice of Dv) tile, in fp32 registers. Many heads: one segment, one pass. Few heads: a first pass sums up each
segment, a small scan turns the sums into the states that enter the segments, and the second pass writes outputs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels._triton import dot, dot_precision, next_power_of_two, offset, on_device_of
from attnopt.kernels.lightning.blocks import LEAST_LOG_DECAY, LOG2E, log2_decay
from attnopt.kernels.lightning.triton_tiles import Tiles, choose_tiles, processors_of

_LEAST = tl.constexpr(LEAST_LOG_DECAY)
_LOG2E = tl.constexpr(LOG2E)


@dataclass(frozen=True, slots=True)
class Swept:
    """out (B, H, S, DZ); state (B, H, DX, DZ) fp32 after the last chunk.

    row_dots (B, H, S): rows of out . own, without what each row takes from its own position; zeros without `own`.
    """

    out: Tensor
    state: Tensor
    row_dots: Tensor


@dataclass(frozen=True, slots=True)
class Decay:
    """Log decay as the kernel reads it, with chunks of `chunk` rows.

    Per head: `high` is log_decay (H,), or None for no decay. Per token: `high + low` (B, H, whole chunks) fp32 is its
    running sum inside each chunk, to base 2, in two parts so that differences of long sums keep their digits.
    """

    chunk: int
    high: Tensor | None = None
    low: Tensor | None = None

    @property
    def stride(self) -> int:
        """Elements from one head to the next."""
        if self.high is None:
            return 0
        return self.high.stride(0) if self.low is None else self.high.shape[-1]


def prepare_decay(log_decay: Tensor | None, chunk: int) -> Decay:
    """`log_decay` None, (H,) or (B, H, S), as the kernel reads it."""
    if log_decay is None or log_decay.dim() == 1:
        return Decay(chunk, log_decay)
    rest = -log_decay.shape[-1] % chunk
    steps = torch.nn.functional.pad(log2_decay(log_decay), (0, rest))
    run = steps.unflatten(-1, (-1, chunk)).cumsum(-1).flatten(-2)
    high = run.float()
    return Decay(chunk, high, (run - high).float())


@triton.jit
def _address(ptr, stride_b, stride_h, stride_s, stride_d, b, h, rows, columns):
    """Addresses of a tile of one head; rows and columns come shaped (n, 1) and (1, m), or turned."""
    return (
        ptr + offset(b, stride_b) + offset(h, stride_h) + offset(rows, stride_s) + offset(columns, stride_d)
    )


@triton.jit
def _head_decay(high_ptr, stride, h, PER_TOKEN: tl.constexpr):
    """The log decay of a head to base 2; 0 where there is none, or one per token."""
    g = 0.0
    if high_ptr is not None and not PER_TOKEN:
        g = tl.load(high_ptr + h * stride).to(tl.float32)
        g = tl.maximum(g, _LEAST, propagate_nan=tl.PropagateNan.ALL) * _LOG2E
    return g


@triton.jit
def _running_decay(
    high_ptr, low_ptr, stride, bh, chunk, position, PER_TOKEN: tl.constexpr, CHUNK: tl.constexpr
):
    """The two parts of the running log decay at `position` in the chunk; zeros when decay is per head."""
    high = tl.zeros_like(position).to(tl.float32)
    low = high
    if PER_TOKEN:
        at = offset(bh, stride) + chunk * CHUNK + position
        high = tl.load(high_ptr + at)
        low = tl.load(low_ptr + at)
    return high, low


@triton.jit
def _pair_weights(a, g, high, low, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr):
    """2^(log decay from b to a) for row a, column b; 0 where b is later (in reverse: earlier), masked before exp2."""
    row = a[:, None]
    column = a[None, :]
    if PER_TOKEN:
        exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        exponent = -exponent if REVERSE else exponent
    else:
        exponent = g * tl.abs(row - column)
    keep = row <= column if REVERSE else row >= column
    if STRICT:
        keep = keep & (row != column)
    return tl.exp2(tl.where(keep, exponent, float("-inf")))


@triton.jit
def _sweep_kernel(
    x_ptr, x_sb, x_sh, x_ss, x_sd,
    y_ptr, y_sb, y_sh, y_ss, y_sd,
    z_ptr, z_sb, z_sh, z_ss, z_sd,
    out_ptr, out_sb, out_sh, out_ss, out_sd,
    own_ptr, own_sb, own_sh, own_ss, own_sd, dots_ptr,
    high_ptr, low_ptr, decay_stride,
    enter_ptr, enter_sh, enter_sw, enter_sx, enter_sz,
    leave_ptr, leave_sh, leave_sw, logs_ptr,
    scale, H, S, x_share, y_share, z_share, own_share, chunks_each, segments, first_segment, launched, slices,
    DX: tl.constexpr, DZ: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Z: tl.constexpr, CHUNK: tl.constexpr,
    PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr, OUTPUT: tl.constexpr,
    PRECISION: tl.constexpr, STATE_DTYPE: tl.constexpr, STATE_PRECISION: tl.constexpr,
):  # fmt: skip
    # Slices of one segment are neighbours on the grid: they read the same rows while these are in L2.
    pid = tl.program_id(0)
    part = pid % slices
    segment = (pid // slices) % launched + first_segment
    bh = pid // (slices * launched)
    heads = tl.num_programs(0) // (slices * launched)
    b = bh // H
    h = bh % H
    a = tl.arange(0, CHUNK)
    dx = tl.arange(0, BLOCK_X)
    dz = part * BLOCK_Z + tl.arange(0, BLOCK_Z)
    in_x = dx < DX
    in_z = dz < DZ
    in_state = in_x[:, None] & in_z[None, :]

    state = tl.zeros((BLOCK_X, BLOCK_Z), dtype=tl.float32)
    if OUTPUT and enter_ptr is not None:
        at_enter = _address(
            enter_ptr, enter_sh, enter_sw, enter_sx, enter_sz, bh, segment, dx[:, None], dz[None, :]
        )
        state = tl.load(at_enter, mask=in_state, other=0.0)
    g = _head_decay(high_ptr, decay_stride, h, PER_TOKEN)
    decayed = 0.0

    first = segment * chunks_each
    count = tl.minimum(chunks_each, tl.cdiv(S, CHUNK) - first)
    for i in range(count):
        chunk = first + (count - 1 - i if REVERSE else i)
        rows = chunk * CHUNK + a
        live = rows < S
        at_y = _address(y_ptr, y_sb, y_sh, y_ss, y_sd, b, h // y_share, rows[None, :], dx[:, None])
        yt = tl.load(at_y, mask=in_x[:, None] & live[None, :], other=0.0)
        at_z = _address(z_ptr, z_sb, z_sh, z_ss, z_sd, b, h // z_share, rows[:, None], dz[None, :])
        in_out = live[:, None] & in_z[None, :]
        z = tl.load(at_z, mask=in_out, other=0.0)

        # Log decay since the state entered the chunk, until it leaves, and over the whole chunk of m real rows.
        m = tl.minimum(S - chunk * CHUNK, CHUNK)
        high, low = _running_decay(high_ptr, low_ptr, decay_stride, bh, chunk, a, PER_TOKEN, CHUNK)
        last_high, last_low = _running_decay(
            high_ptr, low_ptr, decay_stride, bh, chunk, m - 1, PER_TOKEN, CHUNK
        )  # fmt: skip
        since = g * (a + 1) + (high + low)
        until = g * tl.maximum(m - 1 - a, 0) + ((last_high - high) + (last_low - low))
        total = g * m + (last_high + last_low)

        if OUTPUT:
            at_x = _address(x_ptr, x_sb, x_sh, x_ss, x_sd, b, h // x_share, rows[:, None], dx[None, :])
            x = tl.load(at_x, mask=live[:, None] & in_x[None, :], other=0.0)
            out = dot(x.to(STATE_DTYPE), state.to(STATE_DTYPE), STATE_PRECISION)
            out *= (tl.exp2(until) if REVERSE else tl.exp2(since) * scale)[:, None]
            scores = dot(x, yt, PRECISION) * scale
            weights = _pair_weights(a, g, high, low, PER_TOKEN, REVERSE, own_ptr is not None)
            out += dot((scores * weights).to(z.dtype), z, PRECISION)
            if own_ptr is not None:
                # A token's pair with itself weighs the same in both gradients: left out, so as not to cancel later.
                at_own = _address(
                    own_ptr, own_sb, own_sh, own_ss, own_sd, b, h // own_share, rows[:, None], dz[None, :]
                )
                own = tl.load(at_own, mask=in_out, other=0.0).to(tl.float32)
                tl.store(dots_ptr + offset(part * heads + bh, S) + rows, tl.sum(out * own, axis=1), mask=live)
                itself = tl.sum(tl.where(a[:, None] == a[None, :], scores, 0.0), axis=1)
                out += itself[:, None] * z.to(tl.float32)
            at_out = _address(out_ptr, out_sb, out_sh, out_ss, out_sd, b, h, rows[:, None], dz[None, :])
            tl.store(at_out, out.to(out_ptr.dtype.element_ty), mask=in_out)

        fade = tl.exp2(since if REVERSE else until)
        added = dot((yt.to(tl.float32) * fade[None, :]).to(yt.dtype), z, PRECISION)
        # In reverse the scale belongs to the sum: folded into half-precision operands, small gradients would underflow.
        state = state * tl.exp2(total) + (added * scale if REVERSE else added)
        decayed += total

    at_leave = leave_ptr + offset(bh, leave_sh) + offset(dx, DZ)[:, None] + dz[None, :]
    if OUTPUT:
        tl.store(at_leave, state, mask=in_state & (segment == (0 if REVERSE else segments - 1)))
    else:
        # Each segment's sum goes where the segment after it will look for what enters it.
        after = segment - 1 if REVERSE else segment + 1
        tl.store(at_leave + offset(after, leave_sw), state, mask=in_state)
        tl.store(logs_ptr + bh * segments + after, decayed, mask=part == 0)


@triton.jit
def _carry_kernel(states_ptr, logs_ptr, segments, size, blocks, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Turns segment sums into entering states, in place: state[w] += 2^log[w] * state of the segment before."""
    pid = tl.program_id(0)
    bh = pid // blocks
    cells = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < size
    here = states_ptr + offset(bh * segments, size) + cells
    log = logs_ptr + bh * segments
    stride = size
    one = 1
    if REVERSE:
        here += (segments - 1) * size
        log += segments - 1
        stride = -size
        one = -1
    state = tl.load(here, mask=inside, other=0.0)
    for _ in range(1, segments):
        here += stride
        log += one
        state = state * tl.exp2(tl.load(log)) + tl.load(here, mask=inside, other=0.0)
        tl.store(here, state, mask=inside)


def sweep(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    *,
    decay: Decay,
    scale: float,
    reverse: bool,
    entering: Tensor | None,
    out_dtype: torch.dtype,
    own: Tensor | None = None,
    tiles: Tiles | None = None,
) -> Swept:
    """One sweep (see the module) over all heads.

    x (B, Hx, S, DX), y (B, Hy, S, DX), z (B, Hz, S, DZ), own None or (B, Ho, S, DZ); H is the largest of Hx, Hy, Hz and
    each divides it; entering None or (B, H, DX, DZ) fp32, the state before the first chunk of the sweep. `tiles`
    overrides the choice by shape; its chunk is that of `decay`.
    """
    heads = max(x.shape[1], y.shape[1], z.shape[1])
    shape = (x.shape[0], heads, x.shape[2], z.shape[3])
    out = x.new_empty(shape, dtype=out_dtype)
    state = x.new_empty((*shape[:2], x.shape[3], z.shape[3]), dtype=torch.float32)
    if tiles is None:
        width = (x.shape[3], z.shape[3])
        tiles = choose_tiles(shape[0] * heads, shape[2], *width, x.dtype, decay.chunk, processors_of(x))
    slices = triton.cdiv(z.shape[3], tiles.columns)
    dots = x.new_empty((slices if own is not None else 0, *shape[:3]), dtype=torch.float32)
    launch = _Launch(x, y, z, out, own, dots, decay, scale, reverse, tiles)
    with on_device_of(x):
        if launch.segments == 1:
            _launch_outputs(launch, None if entering is None else entering[:, :, None], state)
        else:
            _launch_outputs(launch, _segment_states(launch, entering), state)
    return Swept(out, state, dots.sum(0))


@dataclass(frozen=True, slots=True)
class _Launch:
    """Everything that the two passes of one sweep share."""

    x: Tensor
    y: Tensor
    z: Tensor
    out: Tensor
    own: Tensor | None
    dots: Tensor
    decay: Decay
    scale: float
    reverse: bool
    tiles: Tiles

    @property
    def chunks_each(self) -> int:
        """Chunks in a segment."""
        return triton.cdiv(triton.cdiv(self.x.shape[2], self.tiles.chunk), self.tiles.segments)

    @property
    def segments(self) -> int:
        """Segments, none of them empty: at most what the tiles ask for."""
        return triton.cdiv(triton.cdiv(self.x.shape[2], self.tiles.chunk), self.chunks_each)


def _segment_states(launch: _Launch, entering: Tensor | None) -> Tensor:
    """First pass and scan: the state entering each segment, (B, H, segments, DX, DZ) fp32."""
    batch, heads = launch.out.shape[:2]
    size = launch.x.shape[3] * launch.z.shape[3]
    states = launch.x.new_empty(
        (batch, heads, launch.segments, launch.x.shape[3], launch.z.shape[3]), dtype=torch.float32
    )
    logs = launch.x.new_empty((batch, heads, launch.segments), dtype=torch.float32)
    first = states[:, :, launch.segments - 1 if launch.reverse else 0]
    if entering is None:
        first.zero_()
    else:
        first.copy_(entering)
    _launch_sums(launch, states, logs)
    blocks = triton.cdiv(size, 1024)
    _carry_kernel[(batch * heads * blocks,)](
        states, logs, launch.segments, size, blocks, REVERSE=launch.reverse, BLOCK=1024
    )
    return states


def _launch_sums(launch: _Launch, states: Tensor, logs: Tensor) -> None:
    """The first pass: every segment but the last in sweep order."""
    first_segment = 1 if launch.reverse else 0
    _run(launch, None, states, logs, first_segment, launch.segments - 1)


def _launch_outputs(launch: _Launch, entering: Tensor | None, state: Tensor) -> None:
    """The second pass, or the only one. entering: None or (B, H, segments or 1, DX, DZ)."""
    _run(launch, entering, state[:, :, None], None, 0, launch.segments)


def _run(
    launch: _Launch,
    entering: Tensor | None,
    leaving: Tensor,
    logs: Tensor | None,
    first_segment: int,
    launched: int,
) -> None:
    x, y, z, out, own, tiles = launch.x, launch.y, launch.z, launch.out, launch.own, launch.tiles
    heads = out.shape[1]
    slices = triton.cdiv(z.shape[3], tiles.columns)
    enter = None if entering is None else entering.flatten(0, 1)
    leave = leaving.flatten(0, 1)
    state_dtype, state_precision = _state_operand(x.dtype)
    _sweep_kernel[(out.shape[0] * heads * launched * slices,)](
        x, *x.stride(), y, *y.stride(), z, *z.stride(), out, *out.stride(),
        own, *(own.stride() if own is not None else (0, 0, 0, 0)), launch.dots,
        launch.decay.high, launch.decay.low, launch.decay.stride,
        enter, *(enter.stride() if enter is not None else (0, 0, 0, 0)), leave, *leave.stride()[:2], logs,
        launch.scale, heads, x.shape[2], heads // x.shape[1], heads // y.shape[1], heads // z.shape[1],
        heads // own.shape[1] if own is not None else 1,
        launch.chunks_each, launch.segments, first_segment, launched, slices,
        DX=x.shape[3], DZ=z.shape[3], BLOCK_X=next_power_of_two(x.shape[3]), BLOCK_Z=tiles.columns, CHUNK=tiles.chunk,
        PER_TOKEN=launch.decay.low is not None, REVERSE=launch.reverse, OUTPUT=logs is None,
        PRECISION=dot_precision(x.dtype), STATE_DTYPE=state_dtype, STATE_PRECISION=state_precision,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _state_operand(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """How the fp32 state enters a product with x: bf16 has its range; fp16 has not, so there TF32 (equal digits)."""
    if dtype == torch.bfloat16:
        return tl.bfloat16, "ieee"
    return tl.float32, "tf32" if dtype == torch.float16 else dot_precision(dtype)
