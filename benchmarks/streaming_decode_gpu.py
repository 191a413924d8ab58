"""Decoding over sinks + window on a GPU: right first, then as a share of what copying memory reaches.

    python benchmarks/streaming_decode_gpu.py [--out benchmarks/results/streaming_decode_gpu.json] [--quick] [--sweep]

A time is the median of CUDA-graph replays over so many layers that their rings do not fit into the L2 cache, as in a
model; it is given for one layer. `kernel` is attention alone, `step` all of StreamingCache.attend: positions, both
rotations, writing the key, attention. The share counts keys and values that are seen, once, against a copy of 1 GiB,
which counts reads and writes. --sweep times other tiles, for the rule that chooses them, and other ways to launch them:
parts joined by a launch of their own, launches that wait for the end of the one before, slots fetched ahead of it.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from _gpu_time import copy_rate
from _record import write
from torch import Tensor

from attnopt.caches import Rotary, StreamingCache
from attnopt.kernels.streaming.ring import Span, Step, decode_in_torch
from attnopt.kernels.streaming.triton_decode import Tiles, choose_tiles, launch

Row = dict[str, Any]

#: Bits that one rounding of the output leaves, and twice that is allowed.
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 20}

#: All rings of a measurement together, in bytes: many times the L2 cache (50 MB).
WORKING_SET = 2 << 30


@dataclass(frozen=True)
class Shape:
    """Sequences, heads and the ring of one layer."""

    batch: int
    heads: int
    kv_heads: int
    window: int
    d: int = 128
    sinks: int = 4

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} KV{self.kv_heads} L{self.sinks}+{self.window} D{self.d}"

    @property
    def bytes(self) -> int:
        """Keys and values of one layer in bf16."""
        return self.batch * self.kv_heads * (self.sinks + self.window) * 2 * self.d * 2


CHECKED = [
    Shape(3, 8, 2, 1020),
    Shape(2, 32, 32, 508, d=64),
    Shape(4, 9, 3, 1000, d=80),
    Shape(1, 4, 4, 4092, d=256),
]
TIMED = [
    Shape(batch, 32, kv_heads, length - 4)
    for batch, kv_heads, length in product((1, 8, 32, 128), (8, 32), (1024, 2048, 4096))
    if batch * kv_heads <= 2048
]


def step_of(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Step:
    """Random operands; sequences of different lengths, all past the first dropped key."""
    s, span = shape, Span(shape.sinks, shape.window)
    near, far = (torch.randn(s.batch, s.heads, s.d, dtype=dtype, device="cuda") for _ in range(2))
    keys, values = (
        torch.randn(s.batch, s.kv_heads, span.slots, s.d, dtype=dtype, device="cuda") for _ in range(2)
    )
    newest = span.slots + torch.arange(s.batch, device="cuda") * 1001
    tickets = torch.zeros(s.batch * s.kv_heads, dtype=torch.int32, device="cuda")
    return Step(near, far, keys, values, newest, span, s.d**-0.5, tickets=tickets)


def layers(shape: Shape) -> list[Step]:
    """As many as exceed the L2 cache, 4 to 64."""
    return [step_of(shape) for _ in range(max(4, min(64, WORKING_SET // shape.bytes)))]


def milliseconds(run: Callable[[], object], repeat: int) -> float:
    """The median replay of `run` as a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    return median(_replays(graph.replay, repeat))


def _replays(replay: Callable[[], None], repeat: int) -> Iterator[float]:
    for _ in range(repeat):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        stop.record()
        stop.synchronize()
        yield start.elapsed_time(stop)


def errors() -> list[Row]:
    """The worst row of each checked case, in units of what the row rule allows: 1 or less is right."""
    return [_error(shape, dtype) for shape, dtype in product(CHECKED, BITS)]


def _error(shape: Shape, dtype: torch.dtype) -> Row:
    step = step_of(shape, dtype)
    wide = {name: getattr(step, name).double() for name in ("near", "far", "keys", "values")}
    exact, found = decode_in_torch(replace(step, **wide)), launch(step)
    gap, size = ((x.norm(dim=-1)) for x in (found.double() - exact, exact))
    return {
        "case": str(shape),
        "dtype": str(dtype),
        "worst": float((gap / (2 * 2.0 ** -BITS[dtype] * size)).max()),
    }


def timed(shape: Shape, rate: float, repeat: int) -> Row:
    """One row of the table."""
    alone = _kernel(layers(shape), None, repeat)
    whole = _whole_step(shape, repeat)
    floor = shape.bytes / rate * 1e3
    return {
        "case": str(shape),
        "tiles": str(choose_tiles(step_of(shape))),
        "kernel_ms": alone,
        "step_ms": whole,
        "share_of_copy": floor / alone,
        "share_of_copy_whole_step": floor / whole,
    }


def _kernel(steps: list[Step], tiles: Tiles | None, repeat: int) -> float:
    """Milliseconds of the kernel alone, for one layer."""
    return milliseconds(lambda: [launch(step, tiles) for step in steps], repeat) / len(steps)


def _whole_step(shape: Shape, repeat: int) -> float:
    """Milliseconds of StreamingCache.attend for one token of each sequence, for one layer."""
    cache = StreamingCache(sinks=shape.sinks, window=shape.window, rotary=Rotary.of(shape.d))
    count = max(4, min(64, WORKING_SET // shape.bytes))
    q, k, v = _tokens(shape)
    with torch.no_grad():
        for layer in range(count):
            cache.attend(q, k, v, layer=layer)
        for ring in cache.layers.values():  # as after a text that has filled them
            ring.keys.normal_()
            ring.values.normal_()
            ring.seen += 2 * cache.span.slots
        return milliseconds(lambda: [cache.attend(q, k, v, layer=n) for n in range(count)], repeat) / count


def _tokens(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        torch.randn(shape.batch, heads, 1, shape.d, dtype=torch.bfloat16, device="cuda")
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return q, k, v


def swept(shape: Shape, rate: float, repeat: int) -> Row:
    """Every choice of tiles for one shape, best first; and every way to launch the chosen ones."""
    steps, found = layers(shape), []
    for block, parts, warps, stages in product((32, 64, 128), (1, 2, 3, 4, 6, 8), (4, 8), (2, 3, 4)):
        part = -(-steps[0].span.slots // parts // block) * block
        if block * stages * shape.d * 4 <= 220_000:
            tiles = Tiles(block, part, warps, stages)
            found.append((shape.bytes / rate * 1e3 / _kernel(steps, tiles, repeat), str(tiles)))
    ways = [
        _way(steps, shape.bytes / rate * 1e3, repeat, tickets=tickets, overlap=overlap)
        for tickets, overlap in product((True, False), repeat=2)
    ]
    ahead = [
        (
            slots,
            shape.bytes / rate * 1e3 / _kernel(steps, replace(choose_tiles(steps[0]), ahead=slots), repeat),
        )
        for slots in (0, 64, 128)
    ]
    return {
        "case": str(shape),
        "best": sorted(found, reverse=True)[:8],
        "ways": ways,
        "slots_fetched_ahead": ahead,
    }


def _way(steps: list[Step], floor: float, repeat: int, *, tickets: bool, overlap: bool) -> Row:
    tiles = replace(choose_tiles(steps[0]), overlap=overlap)
    chosen = steps if tickets else [replace(step, tickets=None) for step in steps]
    return {
        "tickets": tickets,
        "overlap": overlap,
        "share_of_copy": floor / _kernel(chosen, tiles, repeat),
    }


def main() -> None:
    """Checks, times, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    given = parser.parse_args()
    checked = errors()
    wrong = [row for row in checked if row["worst"] > 1]
    print(f"{len(checked) - len(wrong)} of {len(checked)} cases right", *wrong, sep="\n")
    repeat = 20 if given.quick else 100
    rate, shapes = copy_rate(), [s for s in TIMED if s.batch == 8] if given.quick else TIMED
    print(f"copy {rate / 1e12:.2f} TB/s")
    payload = {"copy_bytes_per_second": rate, "errors": checked}
    payload["rows"] = [_shown(timed(shape, rate, repeat)) for shape in shapes]
    print(write("streaming_decode_gpu", payload, given.out), flush=True)
    sweeps = (
        [_shown(swept(shape, rate, 20)) for shape in shapes if (shape.batch, shape.kv_heads) == (8, 8)]
        if given.sweep
        else []
    )
    write("streaming_decode_gpu", payload | {"sweeps": sweeps}, given.out)


def _shown(row: Row) -> Row:
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
