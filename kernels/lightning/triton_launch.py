"""Launches the sweep kernel: one pass, or sums of segments, a scan over them, and the pass that writes outputs."""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attnopt.kernels._triton import dot_precision, next_power_of_two, on_device_of
from attnopt.kernels.lightning.triton_decay import Decay, DecayTerms
from attnopt.kernels.lightning.triton_sweep import carry_kernel, sweep_kernel
from attnopt.kernels.lightning.triton_tiles import WIDEST, Tiles, choose_tiles, processors_of, sum_tiles

#: Tensor descriptors want rows and starts at multiples of this many bytes.
ALIGNMENT = 16

_NO_STRIDES = (0, 0, 0, 0)
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@dataclass(frozen=True, slots=True)
class Swept:
    """out (B, H, S, DZ); state (B, H, DX, DZ) fp32 after the last chunk, or empty."""

    out: Tensor
    state: Tensor


@dataclass(frozen=True, slots=True)
class Sweep:
    """One sweep over all heads, before it runs.

    x (B, Hx, S, DX), y (B, Hy, S, DX), z (B, Hz, S, DZ), own None or (B, Ho, S, DZ); H is the largest of Hx, Hy, Hz and
    each divides it. `tiles.chunk` is that of `decay`. `starts`: None, or (n + 1,) int, where packed sequences start in
    the one row of the batch, and where the last one ends; states then have n for B. With `own` the sweep fills its part
    of `terms`.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    own: Tensor | None
    decay: Decay
    scale: float
    reverse: bool
    tiles: Tiles
    starts: Tensor | None = None
    terms: DecayTerms | None = None

    @property
    def sequences(self) -> int:
        """Sequences: as many as batch rows, or packed ones in a single row."""
        return self.x.shape[0] if self.starts is None else len(self.starts) - 1

    @property
    def heads(self) -> int:
        """Heads of the output."""
        return max(self.x.shape[1], self.y.shape[1], self.z.shape[1])

    @property
    def chunks(self) -> int:
        """Chunks in the sequence."""
        return triton.cdiv(self.x.shape[2], self.tiles.chunk)

    @property
    def chunks_each(self) -> int:
        """Chunks in a segment: whole pieces."""
        pieces = self.tiles.pieces if self.tiles.segments > 1 else 1
        return pieces * triton.cdiv(self.chunks, self.tiles.segments * pieces)

    @property
    def segments(self) -> int:
        """Segments, none of them empty: at most what the tiles ask for."""
        return triton.cdiv(self.chunks, self.chunks_each)


def prepare_sweep(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    *,
    decay: Decay,
    scale: float,
    reverse: bool,
    tiles: Tiles | None = None,
    widest: int = WIDEST,
    starts: Tensor | None = None,
) -> Sweep:
    """A sweep with tiles chosen by shape, at most `widest` columns, unless given."""
    sequences = x.shape[0] if starts is None else len(starts) - 1
    if tiles is None:
        heads = sequences * max(x.shape[1], y.shape[1], z.shape[1])
        tiles = choose_tiles(
            heads, x.shape[2], x.shape[3], z.shape[3], x.dtype, decay.chunk, processors_of(x), widest
        )  # fmt: skip
    if starts is not None:
        # How long each is, only the device knows: none is cut.
        tiles = replace(tiles, segments=1)
    return Sweep(x, y, z, None, decay, scale, reverse, tiles, starts)


def entering_states(sweep: Sweep, entering: Tensor | None) -> Tensor | None:
    """First pass and scan: the state entering each segment, (B, H, segments, DX, DZ) fp32.

    entering: None or (B, H, DX, DZ) fp32, the state before the first chunk of the sweep.
    """
    if sweep.segments == 1:
        return None if entering is None else entering[:, :, None]
    x, each = sweep.x, sweep.tiles.pieces
    entered = (sweep.segments - 1) * each + 1
    sizes = (x.shape[0], sweep.heads, entered, x.shape[3], sweep.z.shape[3])
    states = x.new_empty(sizes, dtype=torch.float32)
    logs = x.new_empty(sizes[:3], dtype=torch.float32)
    first = states[:, :, entered - 1 if sweep.reverse else 0]
    first.zero_() if entering is None else first.copy_(entering)
    cells = states[0, 0, 0].numel()
    blocks = triton.cdiv(cells, 1024)
    with on_device_of(x):
        _run(sweep, _sums_of(sweep, entered), None, None, states, logs)
        carry_kernel[(x.shape[0] * sweep.heads * blocks,)](
            states, logs, entered, cells, blocks, REVERSE=sweep.reverse, BLOCK=1024
        )
    return states[:, :, ::each]


def run_sweep(sweep: Sweep, states: Tensor | None, out_dtype: torch.dtype, *, with_state: bool) -> Swept:
    """The pass that writes outputs; states: what `entering_states` returned, or that of a sweep with the same one."""
    x, size = sweep.x, sweep.z.shape[3]
    out = x.new_empty((x.shape[0], sweep.heads, x.shape[2], size), dtype=out_dtype)
    shape = (sweep.sequences, sweep.heads, x.shape[3], size) if with_state else (0,)
    state = x.new_empty(shape, dtype=torch.float32)
    cut = _Pass(sweep.chunks_each, sweep.segments, 0, sweep.segments, sweep.tiles)
    with on_device_of(x):
        _run(sweep, cut, states, out, state[:, :, None] if with_state else None, None)
    return Swept(out, state)


@dataclass(frozen=True, slots=True)
class _Pass:
    """How the sequence is cut for one pass: `launched` of the `segments`, from the `first` on, `chunks_each` long."""

    chunks_each: int
    segments: int
    first: int
    launched: int
    tiles: Tiles

    def slices(self, z: Tensor) -> int:
        """Programs that share the columns of z."""
        return triton.cdiv(z.shape[3], self.tiles.columns)


def _sums_of(sweep: Sweep, entered: int) -> _Pass:
    """The first pass: the pieces of every segment but the last in sweep order."""
    each = sweep.tiles.pieces
    tiles = sum_tiles(sweep.tiles, sweep.x.shape[3], sweep.z.shape[3], sweep.x.dtype)
    return _Pass(sweep.chunks_each // each, entered, each if sweep.reverse else 0, entered - 1, tiles)


def _run(
    sweep: Sweep,
    cut: _Pass,
    entering: Tensor | None,
    out: Tensor | None,
    leaving: Tensor | None,
    logs: Tensor | None,
) -> None:
    x, y, z, own, tiles = sweep.x, sweep.y, sweep.z, sweep.own, cut.tiles
    enter = None if entering is None else entering.flatten(0, 1)
    leave = None if leaving is None else leaving.flatten(0, 1)
    state_dtype, state_precision = _state_operand(x.dtype)
    width = next_power_of_two(x.shape[3])
    bulk = sweep.starts is None and all(_is_bulk(t) for t in (x, y, z, own) if t is not None)
    x_given, y_given = (_operand(t, tiles.chunk, width, bulk=bulk) for t in (x, y))
    z_given, out_given, own_given = (
        _operand(t, tiles.chunk, tiles.columns, bulk=bulk) for t in (z, out, None if out is None else own)
    )
    sweep_kernel[(sweep.sequences * sweep.heads * cut.launched * cut.slices(z),)](
        *x_given, *y_given, *z_given, *out_given,
        *own_given, *_terms(sweep),
        sweep.starts, sweep.decay.high, sweep.decay.low, sweep.decay.stride,
        enter, *_strides(enter), leave, *_strides(leave)[:2], logs,
        sweep.scale, sweep.scale or 1.0, sweep.heads, x.shape[2],
        sweep.heads // x.shape[1], sweep.heads // y.shape[1], sweep.heads // z.shape[1],
        sweep.heads // own.shape[1] if own is not None else 1,
        cut.chunks_each, cut.segments, cut.first, cut.launched, cut.slices(z),
        DX=x.shape[3], DZ=z.shape[3], BLOCK_X=width, BLOCK_Z=tiles.columns, CHUNK=tiles.chunk,
        PER_TOKEN=sweep.decay.low is not None, REVERSE=sweep.reverse, OUTPUT=out is not None, BULK=bulk,
        OUT_DTYPE=None if out is None else _TYPES[out.dtype],
        PRECISION=dot_precision(x.dtype), STATE_DTYPE=state_dtype, STATE_PRECISION=state_precision,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _strides(states: Tensor | None) -> tuple[int, ...]:
    return _NO_STRIDES if states is None else states.stride()


def _terms(sweep: Sweep) -> tuple[Tensor | None, int, Tensor | None]:
    """Where the kernel leaves its part of d log_decay, and leaves or finds what enters each chunk."""
    if sweep.terms is None:
        return None, 0, None
    rows = sweep.terms.rows[int(sweep.reverse)]
    return rows, rows.stride(0), sweep.terms.states


def _operand(x: Tensor | None, rows: int, columns: int, *, bulk: bool) -> tuple[object, ...]:
    """A tensor as the kernel takes it: a descriptor of its tiles, or a pointer; then four strides."""
    if x is None:
        return None, *_NO_STRIDES
    if not bulk:
        return x, *x.stride()
    # A dimension of one element may have any stride, also one that a descriptor refuses.
    whole = ALIGNMENT // x.element_size()
    strides = [whole if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], [1, 1, rows, columns]), *_NO_STRIDES


def _is_bulk(x: Tensor) -> bool:
    """Whether tiles of x (B, H, S, D) can be copied through tensor descriptors."""
    steps = (
        stride * x.element_size()
        for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
        if size > 1
    )
    aligned = x.data_ptr() % ALIGNMENT == 0 and all(s > 0 and s % ALIGNMENT == 0 for s in steps)
    return aligned and x.element_size() == 2 and (x.stride(3) == 1 or x.shape[3] == 1)


def _state_operand(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """How the fp32 state enters a product with x: bf16 has its range; fp16 has not, so there TF32 (equal digits)."""
    if dtype == torch.bfloat16:
        return tl.bfloat16, "ieee"
    return tl.float32, "tf32" if dtype == torch.float16 else dot_precision(dtype)
