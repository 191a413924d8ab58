"""How a sweep is cut for a device: pure functions of shapes, so that a choice can be read, tested and overridden.

In half types a program holds the state for 128 columns of z on 8 warps, one program on a multiprocessor, or for 64
columns on 4 warps where that fills the device better; measured on an H100 at D 128 (docs/perf-log.md). The other tiles
are those that compile for sm_90 with hardly a register spilled.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
from torch import Tensor

from attnopt.kernels._triton import next_power_of_two

#: Most segments a sequence is cut into: the scan over them is short, and their states stay small.
MOST_SEGMENTS = 128

#: Chunks that a segment has at least: fewer are not worth a state that travels through memory.
LEAST_CHUNKS = 4

#: Columns per program at most.
WIDEST = 128

#: The same of a sweep that leaves terms of d log_decay: it holds a tile more.
WIDEST_WITH_TERMS = 64

#: Pieces in which the first pass sums up a segment: twice as many programs as the second pass has.
PIECES = 2


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one sweep is cut: rows of a chunk, columns of z per program, segments of the sequence; warps and stages.

    `pieces`: of how many parts the first pass sums up a segment.
    """

    chunk: int
    columns: int
    segments: int
    warps: int = 4
    stages: int = 1
    pieces: int = 1


def chunk_rows(length: int, width: int, dtype: torch.dtype) -> int:
    """Rows of a chunk for sequences of `length`, the wider of D and Dv being `width`."""
    if dtype == torch.float32:
        return 16
    return min(64 if width <= 128 else 32, next_power_of_two(length))


@cache
def choose_tiles(
    heads: int,
    length: int,
    dx: int,
    dz: int,
    dtype: torch.dtype,
    chunk: int,
    processors: int,
    widest: int = WIDEST,
) -> Tiles:
    """Tiles for `heads` = B * H sequences on a device with `processors` multiprocessors, `widest` columns at most.

    Of all shapes of programs and numbers of segments, what moves the least through memory for how well it fills the
    device; of equals the first, which has the widest programs.
    """
    chunks = triton.cdiv(length, chunk)
    allowed = max(1, min(MOST_SEGMENTS, chunks // LEAST_CHUNKS))
    candidates = [
        replace(tiles, segments=2**i, pieces=PIECES)
        for tiles in _programs(dx, dz, dtype, chunk)
        if tiles.columns <= widest
        for i in range(allowed.bit_length())
    ]
    return min(candidates, key=lambda tiles: _relative_time(tiles, heads, dz, processors))


def sum_tiles(tiles: Tiles, dx: int, dz: int, dtype: torch.dtype) -> Tiles:
    """Tiles of the first pass, which holds nothing but the state."""
    if dtype == torch.float32 or max(dx, dz) > 128:
        return tiles
    return replace(tiles, columns=next_power_of_two(dz), warps=8 if max(dx, dz) > 64 else 4, stages=3)


def _programs(dx: int, dz: int, dtype: torch.dtype, chunk: int) -> list[Tiles]:
    """Shapes of programs that fit on a multiprocessor, widest first."""
    most = next_power_of_two(dz)
    if dtype == torch.float32:
        return [Tiles(chunk, min(most, 32 if dx <= 128 else 16), 1, warps=4 if dx <= 128 else 8)]
    if dtype == torch.float16 and dx > 128:
        return [Tiles(chunk, min(most, 64), 1, warps=8, stages=2)]
    narrow = Tiles(chunk, min(most, 64), 1, warps=4, stages=3)
    if dtype == torch.float16 or most <= 64:
        return [narrow]
    return [Tiles(chunk, min(most, WIDEST), 1, warps=8, stages=3), narrow]


def _relative_time(tiles: Tiles, heads: int, dz: int, processors: int) -> float:
    """Work over how well the last round of programs fills the device; segments cost a second reading of y and z."""
    slices = triton.cdiv(dz, tiles.columns)
    programs = heads * slices * tiles.segments
    rounds = triton.cdiv(programs, processors)
    traffic = 1.0 if tiles.segments == 1 else 1.5 - 0.5 / tiles.segments + tiles.segments / 256
    padded = slices * tiles.columns / dz
    return traffic * padded * rounds * processors / programs


def processors_of(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device; one where kernels are interpreted."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
