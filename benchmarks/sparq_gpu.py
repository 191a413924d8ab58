"""SparQ decoding on a GPU: right first, then beside dense decoding by cuDNN and flash attention.

    python benchmarks/sparq_gpu.py --out benchmarks/results/sparq_gpu.json [--quick] [--phases]

Each time is the median of CUDA-graph replays in milliseconds, all contenders measured in one run on one card. SparQ is
given the channel-major keys and the mean value, as a cache keeps them; `launched` is the same call without a graph.
"""

import argparse
import json
import math
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from attnopt.kernels.sparq.plain import Decision, approximate, attend_to, decide
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import Tiles, choose_tiles
from attnopt.kernels.sparq.triton_attend import attend
from attnopt.kernels.sparq.triton_decode import choose_positions, decode
from attnopt.kernels.sparq.triton_score import approximate_logits, choose_channels, group_keys

Row = dict[str, Any]

#: Bits that one rounding of the output leaves, and twice that is allowed.
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 20}


@dataclass(frozen=True)
class Shape:
    """One decoding step; `kept` is the share of positions that are not padding."""

    batch: int
    heads: int
    kv_heads: int
    sk: int
    d: int = 128
    kept: float = 1.0
    topk: int = 128

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} KV{self.kv_heads} S{self.sk} D{self.d}"


CHECKED = [
    Shape(2, 8, 8, 1000),
    Shape(1, 32, 8, 4096),
    Shape(2, 8, 2, 3001, kept=0.7),
    Shape(1, 8, 1, 2500, d=80),
    Shape(1, 4, 4, 2000, d=256, topk=600),
    Shape(3, 12, 4, 777, d=64, kept=0.1),
    Shape(1, 8, 8, 100),
]
TIMED = [
    Shape(batch, 32, kv_heads, sk)
    for batch, kv_heads in ((1, 32), (8, 32), (1, 8), (16, 8))
    for sk in (4096, 16384, 65536, 131072)
]


def request_of(shape: Shape, dtype: torch.dtype) -> Request:
    """Random operands on the GPU, with the channel-major keys and the mean value that a cache would hold."""
    s, kv = shape, (shape.batch, shape.kv_heads)
    q = torch.randn(s.batch, s.heads, 1, s.d, dtype=dtype, device="cuda")
    k, v = (torch.randn(*kv, s.sk, s.d, dtype=dtype, device="cuda") for _ in range(2))
    kept = torch.rand(s.batch, s.sk, device="cuda") < s.kept if s.kept < 1 else None
    mean = v.mean(2, dtype=torch.float32) if kept is None else None
    is_blended = s.heads == s.kv_heads
    return Request(q, k, v, k.mT.contiguous(), mean, kept, 32, s.topk, 32, s.d**-0.5, is_blended)


# Right.


def check(shape: Shape, dtype: torch.dtype) -> Row:
    """The worst row error against fp64, in units of what is allowed, and the share of choices that fp64 makes too."""
    request = request_of(shape, dtype)
    tiles = choose_tiles(request)
    positions = _positions(request, tiles)
    got = decode(request).double().cpu()
    rows = [_judge(request, positions, got, i) for i in range(shape.batch * shape.kv_heads)]
    worst, agreed = max(row[0] for row in rows), sum(row[1] for row in rows) / len(rows)
    limit = 2 * 2.0 ** -BITS[dtype]
    return {
        "shape": str(shape), "kept": shape.kept, "topk": shape.topk, "dtype": str(dtype).removeprefix("torch."),
        "worst_row": worst / limit, "same_choice": agreed, "passed": worst <= limit and agreed > 0.99,
    }  # fmt: skip


def _positions(request: Request, tiles: Tiles) -> Tensor:
    if request.is_exact:
        everything = torch.arange(request.k.shape[2])
        return everything.expand(request.k.shape[0] * request.k.shape[1], -1)
    scores = approximate_logits(request, choose_channels(request), tiles)
    return choose_positions(group_keys(request, scores, tiles), request.topk).cpu()


def _judge(request: Request, positions: Tensor, got: Tensor, group: int) -> tuple[float, float]:
    """Largest relative row error of one group by the definition with the kernel's positions, and how many it shares."""
    b, h = divmod(group, request.k.shape[1])
    heads = slice(h * request.group, (h + 1) * request.group)
    q, k, v = (x.double().cpu() for x in (request.q[b, heads, 0], request.k[b, h], request.v[b, h]))
    kept = torch.ones(len(k), dtype=torch.bool) if request.kept is None else request.kept[b].cpu()
    literal = decide(
        q, k, kept, rank=request.rank, topk=request.topk, local=request.local, scale=request.scale
    )
    mine = [p for p in positions[group].tolist() if kept[p]]
    scores = torch.stack([approximate(row, k, literal.channels, kept, request.scale) for row in q])
    mean = v[kept].mean(0) if request.mean_value and len(mine) < int(kept.sum()) else None
    want = attend_to(q, k, v, Decision(literal.channels, mine, scores), request.scale, mean)
    error = (got[b, heads, 0] - want).norm(dim=-1) / want.norm(dim=-1)
    return float(error.max()), len(set(mine) & set(literal.positions)) / len(literal.positions)


# Fast.


def timings(shape: Shape) -> Row:
    """Milliseconds of SparQ and of dense decoding, the ratio to the best dense one, and the rate of SparQ's reads."""
    request = request_of(shape, torch.bfloat16)
    dense = {
        "cudnn": _dense(request, SDPBackend.CUDNN_ATTENTION),
        "flash": _dense(request, SDPBackend.FLASH_ATTENTION),
    }
    sparq = graphed(lambda: decode(request))
    launched = do_bench(lambda: decode(request), return_mode="median")
    read = shape.batch * shape.kv_heads * 2 * (32 * shape.sk + 2 * shape.topk * shape.d)
    ratios = {"speedup": min(dense.values()) / sparq, "read_gb_s": read / sparq / 1e6}
    return {"shape": str(shape), "sparq": sparq, "launched": launched, **dense, **ratios}


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


def phases(shape: Shape) -> Row:
    """Milliseconds of each launch of one step."""
    request = request_of(shape, torch.bfloat16)
    tiles = choose_tiles(request)
    chosen = choose_channels(request)
    scores = approximate_logits(request, chosen, tiles)
    keys = group_keys(request, scores, tiles)
    positions = choose_positions(keys, request.topk)
    return {
        "shape": str(shape),
        "channels": graphed(lambda: choose_channels(request).index),
        "logits": graphed(lambda: approximate_logits(request, chosen, tiles).logits),
        "keys": graphed(lambda: group_keys(request, scores, tiles)),
        "topk": graphed(lambda: choose_positions(keys, request.topk)),
        "attend": graphed(lambda: attend(request, positions, scores, tiles)),
    }


def sweep(shape: Shape) -> Row:
    """Milliseconds of a step with other tiles in the logits kernel; "chosen" is what `choose_tiles` takes."""
    request = request_of(shape, torch.bfloat16)
    usual = choose_tiles(request)
    cuts = [
        (block, split)
        for block in (64, 128, 256)
        for split in (usual.split // 2, usual.split, usual.split * 2)
    ]
    row: Row = {"shape": str(shape), "chosen": f"{usual.block}/{usual.split}"}
    for block, split in cuts:
        if split >= block and -(-shape.sk // split) <= 256:
            row[f"{block}/{split}"] = graphed(
                partial(decode, request, replace(usual, block=block, split=split))
            )
    return row


def main() -> int:
    """Runs the checks, then the timings; exit code 1 when a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="four shapes instead of sixteen")
    parser.add_argument("--phases", action="store_true", help="also each launch by itself, and other tiles")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    checks = [check(shape, dtype) for shape in CHECKED for dtype in BITS]
    timed = TIMED[1::4] if chosen.quick else TIMED
    payload: dict[str, Any] = {"environment": environment(), "checks": checks}
    payload["timings"] = [timings(shape) for shape in timed]
    if chosen.phases:
        payload["phases"] = [phases(shape) for shape in timed]
        payload["sweep"] = [sweep(shape) for shape in timed]
    if chosen.out:
        chosen.out.write_text(json.dumps(payload, indent=1) + "\n")
    for name in ("checks", "phases", "sweep", "timings"):
        _print_table(payload.get(name, []))
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
        print(" | ".join(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row.values()))


if __name__ == "__main__":
    sys.exit(main())
