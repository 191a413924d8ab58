"""SparQ decoding on a GPU: right first, then beside dense decoding by cuDNN and flash attention.

    python benchmarks/sparq_gpu.py --out benchmarks/results/sparq_gpu.json [--quick] [--phases] [--sweep]

Each time is the median of CUDA-graph replays in milliseconds, all contenders measured in one run on one card. `step` is
a whole decoding step of SparQ: the token is appended to both key layouts and the values, the running mean updated, the
length advanced, and the attention computed. Dense attention is timed alone, without its own append. `launched` is the
step without a graph.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from _sparq_checks import BITS, CHECKED, Row, Shape, check, lengths_of, request_of, token_of, versions
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import Tiles, choose_tiles
from attnopt.kernels.sparq.triton_attend import attend
from attnopt.kernels.sparq.triton_bound import bound_runs, bounded_weights
from attnopt.kernels.sparq.triton_decode import choose, decode, score_positions
from attnopt.kernels.sparq.triton_score import approximate_logits, group_weights, row_logits
from attnopt.kernels.sparq.triton_select import sort_positions
from attnopt.kernels.sparq.triton_start import Channels, choose_channels

#: The shapes for which a ratio to dense attention is to be reached, and that ratio.
WANTED = {
    Shape(8, 32, 32, 16384): 4.0,
    Shape(8, 32, 32, 65536): 5.0,
    Shape(64, 32, 32, 4096): 3.02,
    Shape(16, 32, 8, 16384): 2.5,
    Shape(16, 32, 8, 131072): 5.0,
    Shape(1, 32, 8, 131072): 2.5,
}
#: Side by side they check, and compile what is timed afterwards, alone: most of a check is compilation.
PROCESSES = 12

TIMED = [
    *WANTED,
    *(Shape(batch, 32, kv_heads, sk) for batch, kv_heads in ((1, 32), (1, 8)) for sk in (4096, 16384, 65536)),
]


def timings(shape: Shape) -> Row:
    """Milliseconds of a step and of dense decoding, the ratio to the best dense one beside the wanted one, and GB/s."""
    request = request_of(shape, torch.bfloat16)
    dense = {
        "cudnn": _dense(request, SDPBackend.CUDNN_ATTENTION),
        "flash": _dense(request, SDPBackend.FLASH_ATTENTION),
    }
    run = step_of(request)
    step, launched = graphed(run), do_bench(run, return_mode="median")
    read = shape.batch * shape.kv_heads * 2 * (32 * shape.sk + 2 * shape.topk * shape.d)
    ratios = {
        "speedup": min(dense.values()) / step,
        "wanted": WANTED.get(shape, 0.0),
        "read_gb_s": read / step / 1e6,
    }
    return {"shape": str(shape), "step": step, "launched": launched, **dense, **ratios}


def step_of(request: Request, tiles: Tiles | None = None) -> Callable[[], Tensor]:
    """A whole step, always the same one: the length that is advanced is another one than the length that is read."""
    token, advanced = token_of(request), lengths_of(request).clone()

    def run() -> Tensor:
        out = decode(request, tiles, token)
        advanced.add_(1)
        return out

    return run


def _dense(request: Request, backend: SDPBackend) -> float:
    def run() -> Tensor:
        with sdpa_kernel([backend]):
            return scaled_dot_product_attention(request.q, request.k, request.v, enable_gqa=request.group > 1)

    return graphed(run)


def graphed(run: Callable[[], Tensor]) -> float:
    """Median milliseconds of a captured graph's replay; infinite where the contender does not take the shape."""
    try:
        run()
    except RuntimeError as error:
        print(f"does not run: {str(error).splitlines()[0]}", file=sys.stderr)
        return math.inf
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    time: float = do_bench(graph.replay, return_mode="median")
    return time


def compared(shape: Shape) -> Row:
    """Milliseconds of a step in each of its versions."""
    request = request_of(shape, torch.bfloat16)
    found = {name: graphed(step_of(request, tiles)) for name, tiles in versions(request).items()}
    return {"shape": str(shape), **found}


def phases(shape: Shape) -> Row:
    """Milliseconds of each launch of one step, and of torch.topk in the place of the choice."""
    request = request_of(shape, torch.bfloat16)
    stored, token = versions(request)["stored"], token_of(request)
    channels = choose_channels(request, token)
    scores, weights = score_positions(request, channels, stored)
    choice = choose(request, weights, stored)
    row: Row = {
        "shape": str(shape),
        "append_channels": graphed(lambda: choose_channels(request, token).index),
        "logits": math.nan,
        "weights": math.nan,
        "bounds": math.nan,
        "bounded_weights": math.nan,
        "open_runs": math.nan,
        "choose": graphed(lambda: choose(request, weights, stored).positions),
        "torch_topk": graphed(lambda: sort_positions(request, weights).positions),
        "attend": graphed(lambda: attend(request, choice, scores, stored)),
    }
    if request.group == 1:
        return {**row, "logits": graphed(lambda: row_logits(request, channels, stored)[1].best)}
    return row | _of_groups(request, channels, replace(stored, bounded=True))


def _of_groups(request: Request, channels: Channels, tiles: Tiles) -> Row:
    """Milliseconds of the launches for heads that share keys, and how many runs of a group are weighed, of how many."""
    scores, bounds = approximate_logits(request, channels, tiles), bound_runs(request, channels, tiles)
    is_open = bounded_weights(request, channels, bounds, tiles).best != -(2**31)
    return {
        "logits": graphed(lambda: approximate_logits(request, channels, tiles).logits),
        "weights": graphed(lambda: group_weights(request, scores, tiles).weight),
        "bounds": graphed(lambda: bound_runs(request, channels, tiles).best),
        "bounded_weights": graphed(lambda: bounded_weights(request, channels, bounds, tiles).weight),
        "open_runs": f"{is_open.sum(1).float().mean():.0f} of {is_open.shape[1]}",
    }


def sweep(shape: Shape) -> Row:
    """Milliseconds of a step with other tiles: each row changes one of those that `choose_tiles` takes."""
    request = request_of(shape, torch.bfloat16)
    found = {name: graphed(step_of(request, tiles)) for name, tiles in other_tiles(request).items()}
    return {"shape": str(shape), **found}


def compile_for(shape: Shape, with_sweep: bool) -> None:  # noqa: FBT001
    """Compiles what is timed for a shape into Triton's cache on disk, for the process that times it."""
    torch.cuda.empty_cache()
    request = request_of(shape, torch.bfloat16)
    contenders = [choose_tiles(request), *versions(request).values()]
    for tiles in contenders + (list(other_tiles(request).values()) if with_sweep else []):
        step_of(request, tiles)()


def other_tiles(request: Request) -> dict[str, Tiles]:
    """The usual tiles and others, each by what it changes."""
    usual, sk = choose_tiles(request), request.k.shape[2]
    changes: list[dict[str, int]] = [
        {},
        {"split": usual.split * 2}, {"split": max(512, usual.split // 2)},
        {"chosen_block": 32}, {"chosen_block": 64}, {"chosen_block": 128},
        {"run": 16}, {"run": 32}, {"run": 64}, {"narrow": 256},
    ]  # fmt: skip
    if request.group == 1:
        changes += [{"dot_heads": 1}, {"row_stages": 1}, {"row_stages": 2}, {"row_block": 512}]
    else:
        changes += [{"block": 64}, {"block": 256}, {"weight_block": 512}, {"weight_block": 2048}]
        changes += [
            {"bounded": 1, **sizes}
            for sizes in (
                {}, {"block": 64}, {"bound_split": usual.bound_split * 2}, {"bound_split": usual.bound_split // 2},
                {"open_split": usual.open_split * 2}, {"open_split": usual.open_split // 2},
                {"block": 64, "bound_split": usual.bound_split // 2},
            )
        ]  # fmt: skip
    found = {}
    for change in changes:
        tiles = replace(usual, **change)
        if -(-sk // tiles.split) <= 256:
            found[",".join(f"{field}={value}" for field, value in change.items()) or "usual"] = tiles
    return found


def main() -> int:
    """Runs the checks, then the timings; exit code 1 when a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="two shapes")
    parser.add_argument("--phases", action="store_true", help="also each launch by itself")
    parser.add_argument("--sweep", action="store_true", help="also other tiles")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    begin, timed = time.perf_counter(), TIMED[::5] if chosen.quick else TIMED
    with ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool:
        checks = list(pool.map(check, *zip(*product(CHECKED, BITS), strict=True)))
        list(pool.map(compile_for, timed, repeat(chosen.sweep)))
    print(
        f"{sum(row['passed'] for row in checks)} of {len(checks)} right, {time.perf_counter() - begin:.0f} s",
        flush=True,
    )
    payload: dict[str, Any] = {"environment": environment(), "checks": checks}
    _print_table(checks)
    stages = {"timings": timings, "versions": compared} | ({"phases": phases} if chosen.phases else {})
    stages |= {"sweep": sweep} if chosen.sweep else {}
    for name, stage in stages.items():
        payload[name] = [stage(shape) for shape in timed if stage is not sweep or shape in WANTED]
        _print_table(payload[name])
        if chosen.out:
            chosen.out.write_text(json.dumps(payload, indent=1) + "\n")
    return 0 if all(row["passed"] for row in checks) else 1


def environment() -> dict[str, str]:
    """The card and the versions, without which a number means nothing."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    return {"device": torch.cuda.get_device_name(), **versions}


def _print_table(rows: list[Row]) -> None:
    shown: list[str] = []
    for row in rows:
        if list(row) != shown:
            shown = list(row)
            print("\n" + " | ".join(shown))
        print(" | ".join(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row.values()), flush=True)


if __name__ == "__main__":
    sys.exit(main())
