"""How a sweep is cut for a device: pure functions of shapes, so that a choice can be read, tested and overridden.

Chunks of 64 rows and slices of 64 columns on 4 warps were fastest on an H200 for many heads at D 128, slices of 128 on
8 warps with 3 stages for few (bf16). The other tiles are those that compile for sm_90 with hardly a register spilled.
"""

from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from attnopt.kernels._triton import next_power_of_two

#: Most segments a sequence is cut into: the scan over them is short, and their states stay small.
MOST_SEGMENTS = 128

#: Chunks that a segment has at least: fewer are not worth a state that travels through memory.
LEAST_CHUNKS = 4


@dataclass(frozen=True, slots=True)
class Tiles:
    """How one sweep is cut: rows of a chunk, columns of z per program, segments of the sequence; warps and stages."""

    chunk: int
    columns: int
    segments: int
    warps: int = 4
    stages: int = 1


def chunk_rows(length: int, width: int, dtype: torch.dtype) -> int:
    """Rows of a chunk for sequences of `length`, the wider of D and Dv being `width`."""
    if dtype == torch.float32:
        return 16
    return min(64 if width <= 128 else 32, next_power_of_two(length))


def choose_tiles(
    heads: int, length: int, dx: int, dz: int, dtype: torch.dtype, chunk: int, processors: int
) -> Tiles:
    """Tiles for `heads` = B * H sequences on a device with `processors` multiprocessors.

    Many heads fill the device with narrow slices and one pass. With few, wide slices and as many segments as
    make the second reading of y and z worth its price.
    """
    chunks = triton.cdiv(length, chunk)
    narrow = _narrow_tiles(dx, dz, dtype, chunk)
    segments = best_segments(heads * triton.cdiv(dz, narrow.columns), chunks, processors)
    if segments == 1 or dtype != torch.bfloat16 or not 64 < max(dx, dz) <= 128 or dz <= 64:
        return replace(narrow, segments=segments)
    return Tiles(chunk, 128, best_segments(heads, chunks, processors), warps=8, stages=3)


def _narrow_tiles(dx: int, dz: int, dtype: torch.dtype, chunk: int) -> Tiles:
    most = 64
    if dtype == torch.float32:
        most = 32 if dx <= 128 else 16
    return Tiles(chunk, min(most, next_power_of_two(dz)), 1, warps=4 if dx <= 128 else 8)


def best_segments(programs: int, chunks: int, processors: int) -> int:
    """The number of segments (a power of two) with the least estimated time for `programs` one-segment programs."""
    allowed = max(1, min(MOST_SEGMENTS, chunks // LEAST_CHUNKS))
    candidates = (2**i for i in range(allowed.bit_length()))
    return min(candidates, key=lambda n: _relative_time(programs, n, processors))


def _relative_time(programs: int, segments: int, processors: int) -> float:
    """Traffic over how well the device is filled: four programs on three multiprocessors reach full bandwidth."""
    traffic = 1.0 if segments == 1 else 1.5 + segments / 256
    return traffic / min(1.0, programs * segments * 3 / (4 * processors))


def processors_of(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device; one where kernels are interpreted."""
    return torch.cuda.get_device_properties(tensor.device).multi_processor_count if tensor.is_cuda else 1
