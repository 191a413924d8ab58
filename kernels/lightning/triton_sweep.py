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

#: The widest key or value that a program's state tile can hold.
MAX_DIM = 256

_LEAST = tl.constexpr(LEAST_LOG_DECAY)
_LOG2E = tl.constexpr(LOG2E)


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one sweep is cut: rows of a chunk, columns of z per program, segments of the sequence; warps and stages."""

    chunk: int
    columns: int
    segments: int
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True, slots=True)
class Decay:
    """Log decay to base 2 as the kernel reads it.

    kind 0: none. kind 1: `high` is (H,), natural log. kind 2: `high + low` is the running sum inside each chunk,
    (B, H, whole chunks), split in two so that differences of long sums keep their digits.
    """

    kind: int
    high: Tensor | None = None
    low: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Swept:
    """out (B, H, S, DZ); state (B, H, DX, DZ) fp32 after the last chunk.

    row_dots (B, H, S): rows of out . own, without what each row takes from its own position.
    """

    out: Tensor
    state: Tensor
    row_dots: Tensor | None


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
    DECAY: tl.constexpr, REVERSE: tl.constexpr, OUTPUT: tl.constexpr,
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
    x_base = x_ptr + offset(b, x_sb) + offset(h // x_share, x_sh) + offset(dx, x_sd)[None, :]
    y_base = y_ptr + offset(b, y_sb) + offset(h // y_share, y_sh) + offset(dx, y_sd)[:, None]
    z_base = z_ptr + offset(b, z_sb) + offset(h // z_share, z_sh) + offset(dz, z_sd)[None, :]

    state = tl.zeros((BLOCK_X, BLOCK_Z), dtype=tl.float32)
    if OUTPUT and enter_ptr is not None:
        enter = enter_ptr + offset(bh, enter_sh) + offset(segment, enter_sw)
        state = tl.load(enter + offset(dx, enter_sx)[:, None] + offset(dz, enter_sz)[None, :], mask=in_state, other=0.0)
    if DECAY == 1:
        g = tl.load(high_ptr + h * decay_stride).to(tl.float32)
        g = tl.maximum(g, _LEAST, propagate_nan=tl.PropagateNan.ALL) * _LOG2E
    if REVERSE:
        keep = a[:, None] <= a[None, :]
    else:
        keep = a[:, None] >= a[None, :]
    own_pair = a[:, None] == a[None, :]
    if own_ptr is not None:
        keep = keep & (a[:, None] != a[None, :])
    decayed = 0.0

    first = segment * chunks_each
    count = tl.minimum(chunks_each, tl.cdiv(S, CHUNK) - first)
    for i in range(0, count):
        chunk = first + i
        if REVERSE:
            chunk = first + count - 1 - i
        rows = chunk * CHUNK + a
        live = rows < S
        yt = tl.load(y_base + offset(rows, y_ss)[None, :], mask=in_x[:, None] & live[None, :], other=0.0)
        z = tl.load(z_base + offset(rows, z_ss)[:, None], mask=live[:, None] & in_z[None, :], other=0.0)

        # Exponents: since the state entered the chunk, until it leaves, and over the whole chunk of m real rows.
        if DECAY == 1:
            m = tl.minimum(S - chunk * CHUNK, CHUNK)
            since = g * (a + 1)
            until = g * tl.maximum(m - 1 - a, 0)
            total = g * m
        if DECAY == 2:
            at = offset(bh, decay_stride) + chunk * CHUNK
            high = tl.load(high_ptr + at + a)
            low = tl.load(low_ptr + at + a)
            last_high = tl.load(high_ptr + at + CHUNK - 1)
            last_low = tl.load(low_ptr + at + CHUNK - 1)
            since = high + low
            until = (last_high - high) + (last_low - low)
            total = last_high + last_low

        if OUTPUT:
            x = tl.load(x_base + offset(rows, x_ss)[:, None], mask=live[:, None] & in_x[None, :], other=0.0)
            out = dot(x.to(STATE_DTYPE), state.to(STATE_DTYPE), STATE_PRECISION)
            if REVERSE:
                if DECAY:
                    out = out * tl.exp2(until)[:, None]
            elif DECAY:
                out = out * (tl.exp2(since) * scale)[:, None]
            else:
                out = out * scale
            scores = dot(x, yt, PRECISION) * scale
            if own_ptr is not None:
                diagonal = tl.sum(tl.where(own_pair, scores, 0.0), axis=1)
            if DECAY == 0:
                scores = tl.where(keep, scores, 0.0)
            else:
                if DECAY == 1:
                    exponent = g * tl.abs(a[:, None] - a[None, :])
                else:
                    exponent = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
                    if REVERSE:
                        exponent = -exponent
                scores = scores * tl.exp2(tl.where(keep, exponent, float("-inf")))
            out += dot(scores.to(z.dtype), z, PRECISION)
            in_out = live[:, None] & in_z[None, :]
            if own_ptr is not None:
                # A token's pair with itself weighs the same in both gradients: left out, so as not to cancel later.
                at_own = own_ptr + offset(b, own_sb) + offset(h // own_share, own_sh) + offset(rows, own_ss)[:, None]
                own = tl.load(at_own + offset(dz, own_sd)[None, :], mask=in_out, other=0.0).to(tl.float32)
                at_dots = dots_ptr + offset(part * heads + bh, S) + rows
                tl.store(at_dots, tl.sum(out * own, axis=1), mask=live)
                out += diagonal[:, None] * z.to(tl.float32)
            at_out = out_ptr + offset(b, out_sb) + offset(h, out_sh) + offset(rows, out_ss)[:, None]
            tl.store(at_out + offset(dz, out_sd)[None, :], out.to(out_ptr.dtype.element_ty), mask=in_out)

        if DECAY:
            fade = tl.exp2(since if REVERSE else until)
            yt = (yt.to(tl.float32) * fade[None, :]).to(yt.dtype)
            state = state * tl.exp2(total)
            decayed += total
        # In reverse the scale belongs to the sum: folded into half-precision operands, small gradients would underflow.
        if REVERSE:
            state += dot(yt, z, PRECISION) * scale
        else:
            state += dot(yt, z, PRECISION)

    at_leave = leave_ptr + offset(bh, leave_sh) + offset(dx, DZ)[:, None] + dz[None, :]
    if OUTPUT:
        tl.store(at_leave, state, mask=in_state & (segment == (0 if REVERSE else segments - 1)))
    else:
        # Each segment's sum goes where the segment after it will look for what enters it.
        after = segment - 1 if REVERSE else segment + 1
        tl.store(at_leave + offset(after, leave_sw), state, mask=in_state)
        if part == 0:
            tl.store(logs_ptr + bh * segments + after, decayed)


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
    tiles: Tiles,
) -> Swept:
    """One sweep (see the module) over all heads.

    x (B, Hx, S, DX), y (B, Hy, S, DX), z (B, Hz, S, DZ), own None or (B, Ho, S, DZ); heads are the largest of Hx, Hy, Hz
    and each divides them; entering None or (B, H, DX, DZ) fp32, the state before the first chunk of the sweep.
    """
    heads = max(x.shape[1], y.shape[1], z.shape[1])
    shape = (x.shape[0], heads, x.shape[2], z.shape[3])
    out = x.new_empty(shape, dtype=out_dtype)
    state = x.new_empty((*shape[:2], x.shape[3], z.shape[3]), dtype=torch.float32)
    slices = triton.cdiv(z.shape[3], tiles.columns)
    dots = None if own is None else x.new_empty((slices, *shape[:3]), dtype=torch.float32)
    launch = _Launch(x, y, z, out, own, dots, decay, scale, reverse, tiles)
    with on_device_of(x):
        if launch.segments == 1:
            _launch_outputs(launch, None if entering is None else entering[:, :, None], state)
        else:
            _launch_outputs(launch, _segment_states(launch, entering), state)
    return Swept(out, state, None if dots is None else dots.sum(0))


@dataclass(frozen=True, slots=True)
class _Launch:
    """Everything that the two passes of one sweep share."""

    x: Tensor
    y: Tensor
    z: Tensor
    out: Tensor
    own: Tensor | None
    dots: Tensor | None
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
    launch: _Launch, entering: Tensor | None, leaving: Tensor, logs: Tensor | None, first_segment: int, launched: int
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
        launch.decay.high, launch.decay.low, _decay_stride(launch.decay),
        enter, *(enter.stride() if enter is not None else (0, 0, 0, 0)), leave, *leave.stride()[:2], logs,
        launch.scale, heads, x.shape[2], heads // x.shape[1], heads // y.shape[1], heads // z.shape[1],
        heads // own.shape[1] if own is not None else 1,
        launch.chunks_each, launch.segments, first_segment, launched, slices,
        DX=x.shape[3], DZ=z.shape[3], BLOCK_X=next_power_of_two(x.shape[3]), BLOCK_Z=tiles.columns, CHUNK=tiles.chunk,
        DECAY=launch.decay.kind, REVERSE=launch.reverse, OUTPUT=logs is None,
        PRECISION=dot_precision(x.dtype), STATE_DTYPE=state_dtype, STATE_PRECISION=state_precision,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _state_operand(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """How the fp32 state enters a product with x: bf16 has its range; fp16 has not, so there TF32 (equal digits)."""
    if dtype == torch.bfloat16:
        return tl.bfloat16, "ieee"
    return tl.float32, "tf32" if dtype == torch.float16 else dot_precision(dtype)


def _decay_stride(decay: Decay) -> int:
    """Between heads: of the (H,) vector, or the padded length of running sums."""
    if decay.high is None:
        return 0
    return decay.high.stride(0) if decay.kind == 1 else decay.high.shape[-1]


def prepare_decay(log_decay: Tensor | None, chunk: int) -> Decay:
    """`log_decay` None, (H,) or (B, H, S), as the kernel reads it with chunks of `chunk` rows."""
    if log_decay is None:
        return Decay(0)
    if log_decay.dim() == 1:
        return Decay(1, log_decay)
    rest = -log_decay.shape[-1] % chunk
    steps = torch.nn.functional.pad(log2_decay(log_decay), (0, rest))
    run = steps.unflatten(-1, (-1, chunk)).cumsum(-1).flatten(-2)
    high = run.float()
    return Decay(2, high, (run - high).float())


def chunk_rows(length: int, dtype: torch.dtype) -> int:
    """Rows of a chunk: 64 (measured best on H200), half for fp32 whose tiles are twice as large, fewer if S is."""
    return min(32 if dtype == torch.float32 else 64, next_power_of_two(length))


def choose_tiles(heads: int, length: int, dx: int, dz: int, dtype: torch.dtype, processors: int) -> Tiles:
    """Tiles for `heads` = B * H sequences on a device with `processors` multiprocessors.

    Many heads fill the device with narrow slices and one pass. With few, wide slices and as many segments as
    make the second reading of y and z worth its price.
    """
    chunk = chunk_rows(length, dtype)
    narrow, wide = min(64, next_power_of_two(dz)), min(128, next_power_of_two(dz))
    half = dtype != torch.float32
    if not half or dx > 128 or _best_segments(heads * triton.cdiv(dz, narrow), length // chunk, processors) == 1:
        segments = _best_segments(heads * triton.cdiv(dz, narrow), length // chunk, processors)
        return Tiles(chunk, narrow, segments, warps=8 if dx > 128 else 4)
    segments = _best_segments(heads * triton.cdiv(dz, wide), length // chunk, processors)
    return Tiles(chunk, wide, segments, warps=8 if wide == 128 else 4, stages=3 if dtype == torch.bfloat16 else 1)


def _best_segments(programs: int, chunks: int, processors: int) -> int:
    """The number of segments (a power of two) with the least estimated time."""
    candidates = [2**i for i in range(8) if i == 0 or chunks >= 4 * 2**i]
    return min(candidates, key=lambda n: _relative_time(programs * n, n, processors))


def _relative_time(programs: int, segments: int, processors: int) -> float:
    """Traffic over how well the device is filled: one and a third programs a multiprocessor reach full bandwidth."""
    traffic = 1.0 if segments == 1 else 1.5 + segments / 256
    return traffic / min(1.0, programs / (4 / 3 * processors))


def processors_of(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device; one where kernels are interpreted."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
