"""Sinks + sliding window on a GPU: right against fp64 first, then beside flex_attention, cuDNN and a dense mask.

    python benchmarks/streaming_gpu.py [--out FILE] [--unchecked] [--phases] [--tune] [--seconds 300]

Times are medians of replays of a CUDA graph in milliseconds, all contenders in one run; TFLOP/s count visible pairs
only. --phases: each kernel by itself, the ones for Hopper beside the others. --tune: other tiles of the others.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from _gpu_time import replayed
from _record import write
from _streaming_checks import CHECKS, Row, check_all, problem_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from attnopt.kernels.streaming import chunked, triton_backward, triton_forward, triton_hopper
from attnopt.kernels.streaming.places import streaming_attention
from attnopt.kernels.streaming.problem import Problem
from attnopt.kernels.streaming.reach import reach
from attnopt.kernels.streaming.triton_tiles import BY_KEYS, BY_QUERIES, Tiles, tiles_for

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

SINKS = 4

#: Of FlexAttention's block masks: its default.
BLOCK = 128

#: B, N, W; H = 32, D = 128, bf16.
SHAPES = ((1, 16384, 1024), (1, 16384, 4096), (4, 4096, 1024), (1, 65536, 1024), (1, 65536, 4096))
LONGEST_DENSE = 16384


def contenders(length: int, window: int) -> Iterator[tuple[str, Attention, bool]]:
    """Name, attention, and whether its backward is timed too."""

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    yield "attnopt", partial(streaming_attention, sinks=SINKS, window=window), True
    blocks = flex_blocks(length, window, "cuda")
    yield "flex", partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks), True
    yield "cudnn causal", cudnn, True
    if length <= LONGEST_DENSE:
        i, j = torch.arange(length, device="cuda")[:, None], torch.arange(length, device="cuda")[None]
        mask = (i >= j) & ((i - j < window) | (j < SINKS))
        yield "sdpa dense mask", partial(scaled_dot_product_attention, attn_mask=mask), False


def flex_blocks(length: int, window: int, device: str) -> BlockMask:
    """What create_block_mask gives, from the blocks' corners: its compiled sort alone takes minutes of ptxas."""

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        del b, h
        return (i >= j) & ((i - j < window) | (j < SINKS))

    number = torch.arange(math.ceil(length / BLOCK), device=device)
    ahead = (number[:, None] - number[None]) * BLOCK  # of a block's first query, of its first key
    some = (ahead >= 0) & ((ahead - BLOCK + 1 < window) | (number[None] == 0))
    whole = (ahead >= BLOCK) & (ahead + BLOCK - 1 < window)
    (partly, partly_at), (wholly, wholly_at) = (_listed(x) for x in (some & ~whole, whole))
    lengths = (length, length)
    return BlockMask.from_kv_blocks(partly, partly_at, wholly, wholly_at, BLOCK, seen, lengths)


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, those first: (1, 1, Q), (1, 1, Q, K)."""
    first = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return blocks.sum(1, dtype=torch.int32)[None, None], first[None, None].contiguous()


def inputs_of(batch: int, length: int) -> list[Tensor]:
    """q, k, v."""
    torch.manual_seed(0)
    return [
        torch.randn(batch, 32, length, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    ]


def timings(batch: int, length: int, window: int) -> Row:
    """One row: milliseconds and TFLOP/s of each contender, forward, and forward with backward."""
    inputs = inputs_of(batch, length)
    pairs = reach(offset=0, window=window, sinks=SINKS, prefix=0, rows=length, columns=length).pairs()
    flops = 4 * 128 * 32 * batch * pairs
    row: Row = {"shape": f"B{batch} N{length} H32 D128 W{window} S{SINKS}"}
    for name, attention, backward in contenders(length, window):
        with torch.no_grad():
            row[name] = milliseconds(lambda run=attention: run(*inputs))
        row[f"{name} TF"] = flops / row[name] / 1e9
        if backward:
            row[f"{name} +bwd"] = milliseconds(lambda run=attention: _both(run, inputs))
            row[f"{name} +bwd TF"] = 3.5 * flops / row[f"{name} +bwd"] / 1e9
    row["x flex"] = row["flex"] / row["attnopt"]
    row["x flex +bwd"] = row["flex +bwd"] / row["attnopt +bwd"]
    return row


def _both(attention: Attention, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    o = attention(*inputs)
    return torch.autograd.grad(o, inputs, o.detach())


def milliseconds(run: Callable[[], object]) -> float:
    """Median of graph replays; infinite where a contender does not take the shape."""
    try:
        return replayed(run)["ms"]
    except RuntimeError as error:
        print(f"does not run: {str(error).splitlines()[0]}", file=sys.stderr)
        return math.inf


def phases(batch: int, length: int, window: int) -> Row:
    """Milliseconds of each kernel: those for Hopper, and the others with their usual tiles."""
    problem = plain_problem(batch, length, window)
    answer = triton_forward.launch(problem)
    rows = triton_backward.prepare(problem, answer, answer.o, None)
    common = triton_backward.common_arguments(problem, answer.o, rows)
    queries, keys = tiles_for(problem, BY_QUERIES), tiles_for(problem, BY_KEYS)
    runs: dict[str, Callable[[], object]] = {
        "forward": partial(triton_forward.launch, problem),
        "prepare": partial(triton_backward.prepare, problem, answer, answer.o, None),
        "far sinks": partial(triton_backward.far_sinks, problem, common, keys),
        "queries": partial(triton_backward.queries, problem, common, queries),
        "keys and far sinks": partial(triton_backward.keys, problem, common, keys),
    }
    if triton_hopper.serves(problem):
        runs |= {
            "hopper forward": partial(triton_hopper.launch, problem),
            "hopper queries": partial(triton_hopper.queries, problem, answer.o, rows.delta, rows.tail),
        }
    return {
        "shape": f"B{batch} N{length} W{window}",
        **{name: milliseconds(run) for name, run in runs.items()},
    }


def plain_problem(batch: int, length: int, window: int) -> Problem:
    """The shapes' attention as the kernels take it."""
    q, k, v = (x.detach() for x in inputs_of(batch, length))
    return problem_of(
        (q, k, v, None, None, None, None, 128**-0.5, 0, window, SINKS, 0, None, "zero", None, 0, False)
    )


# Which tiles.

FORWARD_TILES = [
    *(Tiles(128, 64, 8, stages) for stages in (2, 3, 4)),
    *(Tiles(128, 128, 8, stages) for stages in (1, 2, 3)),
    *(Tiles(64, 64, 4, stages) for stages in (2, 3)),
    *(Tiles(128, 32, warps, 3) for warps in (4, 8)),
    Tiles(128, 64, 4, 3),
    Tiles(64, 128, 4, 2),
]
BACKWARD_TILES = [
    *(Tiles(64, 128, 8, stages) for stages in (1, 2, 3)),
    *(Tiles(32, 128, 8, stages) for stages in (2, 3)),
    *(Tiles(64, 64, warps, 2) for warps in (4, 8)),
    *(Tiles(128, 128, 8, stages) for stages in (1, 2)),
    Tiles(32, 64, 4, 2),
]


def tune(batch: int, length: int, window: int) -> list[Row]:
    """Milliseconds of each kernel with other tiles, fastest first, the present choice among them."""
    problem = plain_problem(batch, length, window)
    answer = triton_forward.launch(problem)
    keys, queries = tiles_for(problem, BY_KEYS), tiles_for(problem, BY_QUERIES)
    backward = partial(triton_backward.launch, problem, answer, answer.o, None)
    turned = [replace(t, queries=t.keys, keys=t.queries) for t in BACKWARD_TILES]
    runs: dict[str, dict[Tiles, Callable[[], object]]] = {
        "forward": {t: partial(triton_forward.launch, problem, t) for t in (queries, *FORWARD_TILES)},
        "backward by keys": {t: partial(backward, t, queries) for t in (keys, *BACKWARD_TILES)},
        "backward by queries": {t: partial(backward, keys, t) for t in (queries, *turned)},
    }
    chosen = {"forward": queries, "backward by keys": keys, "backward by queries": queries}
    rows = [
        {
            "shape": f"N{length} W{window}",
            "kernel": kernel,
            "tiles": str(t),
            "ms": milliseconds(run),
            "now": t == chosen[kernel],
        }
        for kernel, candidates in runs.items()
        for t, run in candidates.items()
    ]
    return sorted(rows, key=lambda row: (row["kernel"], row["ms"]))


def exact_fp32() -> list[Row]:
    """fp32 by the torch path, which the op takes, and by the unrolled kernel: which is faster decides."""
    q, k, v = (x.detach()[:, :8].float() for x in inputs_of(1, 4096))
    problem = problem_of((q, k, v, None, None, None, None, 128**-0.5, 0, 1024, SINKS, 0, None, "zero"))
    torch_path, kernel = (
        milliseconds(partial(run, problem)) for run in (chunked.forward, triton_forward.launch)
    )
    return [{"shape": "fp32 B1 N4096 H8 D128 W1024", "torch path": torch_path, "triton": kernel}]


def main() -> int:
    """Checks, measures, writes, prints; exit code 1 when a check fails."""
    chosen = parse()
    begin = time.perf_counter()
    payload: dict[str, object] = {"checks": (checks := [] if chosen.unchecked else list(check_all(CHECKS)))}
    if chosen.tune:
        payload |= {"tiles": (tiles := tune(*SHAPES[0])), "fp32": (fp32 := exact_fp32())}
        table(tiles, "tiles")
        table(fp32, "fp32")
    times: list[Row] = []
    parts: list[Row] = []
    for shape in SHAPES:
        if time.perf_counter() - begin > chosen.seconds:
            print(f"{chosen.seconds:.0f} s are over: left out {shape}", flush=True)
            continue
        torch._dynamo.reset()  # flex_attention is compiled anew for each shape, past torch's limit
        times.append(timings(*shape))
        print(times[-1], flush=True)
        parts += [phases(*shape)] if chosen.phases else []
        write("streaming_gpu", {**payload, "timings": times, "phases": parts}, chosen.out)
    table([row for row in checks if not row["passed"]], "failed checks")
    print(f"\n{sum(row['passed'] for row in checks)} of {len(checks)} checks passed")
    table(times, "timings")
    table(parts, "phases")
    return 0 if all(row["passed"] for row in checks) else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--unchecked", action="store_true", help="only times")
    parser.add_argument("--phases", action="store_true", help="also each kernel by itself")
    parser.add_argument("--tune", action="store_true", help="also other tiles, at the first shape")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin no shape after so many")
    return parser.parse_args()


def table(rows: list[Row], title: str) -> None:
    """Prints rows under a line of their names, each time the names change."""
    shown: list[str] = []
    for row in rows:
        if list(row) != shown:
            shown = list(row)
            print(f"\n{title}\n" + " | ".join(shown))
        print(" | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row.values()))


if __name__ == "__main__":
    sys.exit(main())
