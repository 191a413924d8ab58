"""SparQ decoding on a GPU: right first, then beside dense decoding by cuDNN and flash attention.

    python benchmarks/sparq_gpu.py --out benchmarks/results/sparq_gpu.json [--quick] [--phases]

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
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from attnopt.kernels.sparq.triton_decode import choose, decode, served
from attnopt.kernels.sparq.triton_score import (
    Token,
    approximate_logits,
    choose_channels,
    group_weights,
    score_positions,
)
from attnopt.kernels.sparq.triton_select import sort_positions

Row = dict[str, Any]

#: Bits that one rounding of the output leaves, and twice that is allowed.
BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 20}


@dataclass(frozen=True)
class Shape:
    """One decoding step into the last of `sk` positions; `kept` is the share of positions that are not padding.

    A cache with `ends` counts from a fifth to four fifths of its buffers in its second row, and on in the next ones.
    """

    batch: int
    heads: int
    kv_heads: int
    sk: int
    d: int = 128
    kept: float = 1.0
    topk: int = 128
    ends: bool = False

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
    Shape(3, 8, 8, 5000, ends=True),
    Shape(3, 16, 4, 3000, ends=True),
    Shape(2, 32, 2, 3000, ends=True),
    Shape(1, 2, 1, 200_000),
    Shape(1, 1, 1, 1_000_000),
]
#: The shapes for which a ratio to dense attention is to be reached, and that ratio.
WANTED = {
    Shape(8, 32, 32, 16384): 4.0,
    Shape(8, 32, 32, 65536): 5.0,
    Shape(64, 32, 32, 4096): 3.02,
    Shape(16, 32, 8, 16384): 2.5,
    Shape(16, 32, 8, 131072): 5.0,
    Shape(1, 32, 8, 131072): 2.5,
}
TIMED = [
    *WANTED,
    *(Shape(batch, 32, kv_heads, sk) for batch, kv_heads in ((1, 32), (1, 8)) for sk in (4096, 16384, 65536)),
]


def request_of(shape: Shape, dtype: torch.dtype) -> Request:
    """Random buffers on the GPU with both key layouts and the mean value, into which one more token is to go."""
    s, kv = shape, (shape.batch, shape.kv_heads)
    q = torch.randn(s.batch, s.heads, 1, s.d, dtype=dtype, device="cuda")
    k, v = (torch.randn(*kv, s.sk, s.d, dtype=dtype, device="cuda") for _ in range(2))
    kept = torch.rand(s.batch, s.sk, device="cuda") < s.kept if s.kept < 1 else None
    row = torch.arange(s.batch, device="cuda")
    lengths = torch.full_like(row, s.sk - 1) if not s.ends else s.sk - 1 - row * (s.sk // 5)
    starts = None if not s.ends else row * (s.sk // 5)
    is_blended = s.heads == s.kv_heads
    choices = (32, s.topk, 32, s.d**-0.5, is_blended)
    request = Request(q, k, v, k.mT.contiguous(), None, kept, *choices, starts, lengths, grown=0)
    mean = torch.stack([_mean(request, b) for b in range(s.batch)])
    return replace(request, v_mean=mean if kept is None else None, grown=1)


def _mean(request: Request, b: int) -> Tensor:
    """(Hkv, Dv) fp32: the mean of what row b counts, without a mask."""
    first = 0 if request.starts is None else int(request.starts[b])
    return request.v[b, :, first : int(_lengths(request)[b])].mean(1, dtype=torch.float32)


def _lengths(request: Request) -> Tensor:
    """The lengths that `request_of` gave."""
    return torch.tensor(0) if request.lengths is None else request.lengths


def token_of(request: Request) -> Token:
    """A random token for the buffers of a request."""
    return Token(torch.randn_like(request.k[:, :, :1]), torch.randn_like(request.v[:, :, :1]))


# Right.


def check(shape: Shape, dtype: torch.dtype) -> Row:
    """The worst row error against fp64, in units of what is allowed, and the share of choices that fp64 makes too."""
    request = request_of(shape, dtype)
    tiles, token = choose_tiles(request), token_of(request)
    got = decode(request, token=token).double().cpu()
    in_step = _is_in_step(request, token)
    request = served(request, tiles)
    positions = _positions(request, tiles)
    request = request.masked()
    rows = [_judge(request, positions, got, i) for i in range(shape.batch * shape.kv_heads)]
    worst, agreed = max(row[0] for row in rows), sum(row[1] for row in rows) / len(rows)
    limit = 2 * 2.0 ** -BITS[dtype]
    return {
        "shape": str(shape), "kept": shape.kept, "topk": shape.topk, "dtype": str(dtype).removeprefix("torch."),
        "worst_row": worst / limit, "same_choice": agreed, "in_step": in_step,
        "passed": worst <= limit and agreed > 0.99 and in_step,
    }  # fmt: skip


def _is_in_step(request: Request, token: Token) -> bool:
    """Whether the token stands in all buffers, and the mean is that of the values."""
    for b, at in enumerate(_lengths(request).tolist()):
        rows = (request.k[b, :, at], request.keys_by_channel[b, :, :, at], request.v[b, :, at])
        news = (token.k[b, :, 0], token.k[b, :, 0], token.v[b, :, 0])
        if not all(torch.equal(row, new) for row, new in zip(rows, news, strict=True)):
            return False
        first = 0 if request.starts is None else int(request.starts[b])
        mean = request.v[b, :, first : at + 1].mean(1, dtype=torch.float32)
        if request.v_mean is not None and not torch.allclose(request.v_mean[b], mean, rtol=1e-4, atol=1e-5):
            return False
    return True


def _positions(request: Request, tiles: Tiles) -> Tensor:
    if request.is_exact:
        everything = torch.arange(request.k.shape[2])
        return everything.expand(request.k.shape[0] * request.k.shape[1], -1)
    _, weights = score_positions(request, choose_channels(request), tiles)
    return choose(request, weights, tiles).positions.cpu()


def _judge(request: Request, positions: Tensor, got: Tensor, group: int) -> tuple[float, float]:
    """Largest relative row error of one group by the definition with the kernel's positions, and how many it shares."""
    b, h = divmod(group, request.k.shape[1])
    heads = slice(h * request.group, (h + 1) * request.group)
    q, k, v = (x.double().cpu() for x in (request.q[b, heads, 0], request.k[b, h], request.v[b, h]))
    kept = torch.ones(len(k), dtype=torch.bool) if request.kept is None else request.kept[b].cpu()
    literal = decide(
        q, k, kept, rank=request.rank, topk=request.topk, local=request.local, scale=request.scale
    )
    mine = [p for p in positions[group].tolist() if p >= 0 and kept[p]]
    scores = torch.stack([approximate(row, k, literal.channels, kept, request.scale) for row in q])
    mean = v[kept].mean(0) if request.mean_value and len(mine) < int(kept.sum()) else None
    want = attend_to(q, k, v, Decision(literal.channels, mine, scores), request.scale, mean)
    error = (got[b, heads, 0] - want).norm(dim=-1) / want.norm(dim=-1)
    return float(error.max()), len(set(mine) & set(literal.positions)) / len(literal.positions)


# Fast.


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
    token, advanced = token_of(request), _lengths(request).clone()

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


def phases(shape: Shape) -> Row:
    """Milliseconds of each launch of one step, and of torch.topk in place of the choice."""
    request = request_of(shape, torch.bfloat16)
    tiles, token = choose_tiles(request), token_of(request)
    channels = choose_channels(request, token)
    scores, weights = score_positions(request, channels, tiles)
    choice = choose(request, weights, tiles)
    row: Row = {
        "shape": str(shape),
        "append_channels": graphed(lambda: choose_channels(request, token).index),
        "logits_of_rows": math.nan,
        "logits_by_dots": graphed(lambda: approximate_logits(request, channels, tiles).logits),
        "weights": math.nan,
        "choose": graphed(lambda: choose(request, weights, tiles).positions),
        "torch_topk": graphed(lambda: sort_positions(request, weights).positions),
        "attend": graphed(lambda: attend(request, choice, scores, tiles)),
    }
    if request.group == 1:
        return {**row, "logits_of_rows": graphed(lambda: score_positions(request, channels, tiles)[1].best)}
    return {**row, "weights": graphed(lambda: group_weights(request, scores, tiles).weight)}


def sweep(shape: Shape) -> Row:
    """Milliseconds of a step with other tiles: each row changes one of those that `choose_tiles` takes."""
    request = request_of(shape, torch.bfloat16)
    usual = choose_tiles(request)
    changes: list[dict[str, int]] = [
        {},
        {"split": usual.split * 2}, {"split": max(512, usual.split // 2)},
        {"chosen_block": 32}, {"chosen_block": 128},
        {"run": 16}, {"run": 32}, {"run": 64},
    ]  # fmt: skip
    if request.group == 1:
        changes += [{"dot_heads": 1}, {"row_stages": 2}, {"row_stages": 3}, {"row_block": 512}]
    else:
        changes += [{"block": 64}, {"block": 256}, {"weight_block": 512}, {"weight_block": 2048}]
    row: Row = {"shape": str(shape)}
    for change in changes:
        name = ",".join(f"{field}={value}" for field, value in change.items()) or "usual"
        tiles = replace(usual, **change)
        if -(-shape.sk // tiles.split) <= 256:
            row[name] = graphed(step_of(request, tiles))
    return row


def main() -> int:
    """Runs the checks, then the timings; exit code 1 when a check fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="two shapes")
    parser.add_argument("--phases", action="store_true", help="also each launch by itself, and other tiles")
    chosen = parser.parse_args()
    torch.manual_seed(0)
    checks = [check(shape, dtype) for shape in CHECKED for dtype in BITS]
    timed = TIMED[::5] if chosen.quick else TIMED
    payload: dict[str, Any] = {"environment": environment(), "checks": checks}
    payload["timings"] = [timings(shape) for shape in timed]
    if chosen.phases:
        payload["phases"] = [phases(shape) for shape in timed]
        payload["sweep"] = [sweep(shape) for shape in timed]
    if chosen.out:
        chosen.out.write_text(json.dumps(payload, indent=1) + "\n")
    for name in ("phases", "sweep", "checks", "timings"):
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
