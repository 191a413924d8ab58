"""Sinks + sliding window on a GPU: right against fp64 first, then beside flex_attention, cuDNN and a dense mask.

    python benchmarks/streaming_gpu.py --out streaming_gpu.json [--quick] [--tune]

Correctness: each row of the output within twice eager's own error in the same dtype, each gradient's rows within three
times. Times are medians of triton.testing.do_bench in milliseconds, all contenders in one run; TFLOP/s count visible
pairs only. --tune also times other tiles of the three kernels.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _record import write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from attnopt.kernels.streaming import chunked, triton_backward, triton_forward
from attnopt.kernels.streaming.op import attend, streaming_attention
from attnopt.kernels.streaming.problem import Problem
from attnopt.kernels.streaming.reach import reach
from attnopt.kernels.streaming.triton_tiles import BY_KEYS, BY_QUERIES, Tiles, tiles_for

Row = dict[str, Any]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 20}
SINKS = 4


@dataclass(frozen=True)
class Shape:
    """One correctness case: sizes, structure, and which tensors come with it."""

    sq: int
    sk: int
    d: int = 128
    dv: int = 128
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    offset: int | None = 0
    window: int | None = None
    sinks: int = 0
    prefix: int = 0
    extras: tuple[str, ...] = ()

    def visible(self) -> Tensor:
        """bool (Sq, Sk), from the definition."""
        i = torch.arange(self.sq, device="cuda")[:, None]
        j = torch.arange(self.sk, device="cuda")[None]
        seen = (i >= 0) & (j >= 0) if self.offset is None else j <= i + self.offset
        if self.offset is not None and self.window is not None:
            seen = seen & ((j > i + self.offset - self.window) | (j < self.sinks))
        return seen | (j < self.prefix)


CHECKS = (
    Shape(1, 2, offset=1),
    Shape(1, 1000, offset=999, window=300, sinks=4),
    Shape(257, 257),
    Shape(1000, 1000, offset=None),
    Shape(1000, 1000, window=200, sinks=4, heads=8, kv_heads=2),
    Shape(2048, 2048, window=1024, sinks=4, batch=2),
    Shape(2048, 2048, window=256, sinks=4, d=64, dv=64, heads=8),
    Shape(1500, 1500, window=100, sinks=4, d=256, dv=256),
    Shape(1500, 1500, window=100, sinks=40, d=80, dv=80),
    Shape(999, 999, window=2, d=40, dv=96),
    Shape(700, 1900, offset=1200, window=333, sinks=130, d=96, dv=96),
    Shape(1300, 1300, offset=-60, window=500, sinks=4),
    Shape(1200, 1200, prefix=300, d=64, dv=64),
    Shape(1111, 1111, window=200, sinks=4, extras=("padding",), batch=2),
    Shape(1111, 1111, window=200, sinks=4, extras=("mask",)),
    Shape(1111, 1111, extras=("bias",)),
    Shape(1111, 1111, window=200, sinks=4, extras=("softcap", "sink_logits")),
    Shape(
        600,
        600,
        d=16,
        dv=16,
        heads=6,
        kv_heads=3,
        extras=("bias", "mask", "padding", "softcap", "sink_logits"),
    ),
    Shape(640, 640, d=160, dv=200),
)

#: B, N, W; H = 32, D = 128, bf16.
SHAPES = ((4, 4096, 1024), (1, 16384, 1024), (1, 16384, 4096), (1, 65536, 1024), (1, 65536, 4096))
LONGEST_DENSE = 16384


# Right.


def arguments_of(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of the op, in the order of its schema."""
    torch.manual_seed(0)
    s, extras = shape, set(shape.extras)
    make = partial(torch.randn, device="cuda")
    q = make(s.batch, s.sq, s.heads, s.d).to(dtype).transpose(1, 2)
    k, v = (make(s.batch, s.kv_heads, s.sk, n).to(dtype) for n in (s.d, s.dv))
    bias = make(1, s.heads, s.sq, s.sk).to(dtype) if "bias" in extras else None
    mask = torch.rand(1, 1, s.sq, s.sk, device="cuda") < 0.7 if "mask" in extras else None
    keep = torch.rand(s.batch, s.sk, device="cuda") < 0.7 if "padding" in extras else None
    z = make(s.heads).to(dtype) if "sink_logits" in extras else None
    softcap = 20.0 if "softcap" in extras else None
    structure = (s.offset, s.window, s.sinks, s.prefix)
    return (q, k, v, bias, mask, keep, z, s.d**-0.5, *structure, softcap, "zero", None, 0, False)


def definition(shape: Shape, arguments: tuple[Any, ...]) -> Tensor:
    """All scores at once, in the dtype of the arguments; rows that see no key are zero."""
    (q, k, v, bias, mask, keep, z, scale), softcap = arguments[:8], arguments[12]
    k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for x in (k, v))
    scores = q @ k.mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    seen = shape.visible()[None, None]
    seen = seen if mask is None else seen & mask
    seen = seen if keep is None else seen & keep[:, None, None]
    logits = scores.masked_fill(~seen, -torch.inf)
    sink = logits.new_full((), -torch.inf) if z is None else z[None, :, None, None].to(logits.dtype)
    logits = torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], -1)
    empty = torch.isneginf(logits).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1)[..., :-1].masked_fill(empty, 0.0) @ v


def results_of(run: Callable[..., Tensor], arguments: tuple[Any, ...], do: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of q, k, v."""
    leaves = [x.detach().requires_grad_() for x in arguments[:3]]
    o = run((*leaves, *arguments[3:]))
    return {"o": o, **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, do), strict=True))}


def kernels(arguments: tuple[Any, ...], do: Tensor) -> dict[str, Tensor]:
    """The Triton kernels by themselves, whatever path the op would choose."""
    problem = problem_of(arguments)
    answer = triton_forward.launch(problem)
    found = triton_backward.launch(problem, answer, do, None)
    return {"o": answer.o, "dq": found.q, "dk": found.k, "dv": found.v}


def problem_of(arguments: tuple[Any, ...]) -> Problem:
    """The arguments as the kernels take them."""
    q, k, *_ = arguments
    offset, window, sinks, prefix = arguments[8:12]
    where = reach(
        offset=offset, window=window, sinks=sinks, prefix=prefix, rows=q.shape[2], columns=k.shape[2]
    )
    return Problem(*arguments[:8], where, *arguments[12:])


def check(shape: Shape, dtype: torch.dtype) -> Row:
    """The worst row of each result of op and kernels, in units of what is allowed."""
    arguments = arguments_of(shape, dtype)
    do = torch.randn(shape.batch, shape.heads, shape.sq, shape.dv, device="cuda").to(dtype)
    wide = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)
    exact = results_of(partial(definition, shape), wide, do.double())
    eager = results_of(partial(definition, shape), arguments, do)
    found = {"op": results_of(lambda a: attend(*a)[0], arguments, do), "triton": kernels(arguments, do)}
    row: Row = {"shape": str(shape), "dtype": str(dtype).removeprefix("torch.")}
    for path, name in product(found, exact):
        row[f"{path} {name}"] = excess(found[path][name], exact[name], eager[name], BITS[dtype], name)
    row["passed"] = all(x <= 1 for x in row.values() if isinstance(x, float))
    return row


def check_all(shapes: tuple[Shape, ...]) -> Iterator[Row]:
    """Every shape in bf16, each second one in fp16, each fourth in fp32: compiling is what takes the time."""
    for n, shape in enumerate(shapes):
        for dtype, every in ((torch.bfloat16, 1), (torch.float16, 2), (torch.float32, 4)):
            if n % every == 0:
                yield check(shape, dtype)


def excess(got: Tensor, exact: Tensor, eager: Tensor, bits: int, name: str) -> float:
    """The largest error of a row over its allowance; a gradient's row may cancel, so it counts as a typical one."""
    if not torch.isfinite(got).all():
        return float("inf")
    error, own = ((x.double() - exact).norm(dim=-1) for x in (got, eager))
    size = exact.norm(dim=-1)
    size = size if name == "o" else size.clamp_min(float(size.square().mean().sqrt()))
    return float((error / ((2 if name == "o" else 3) * torch.maximum(own, 2.0**-bits * size) + 1e-30)).max())


# Fast.


def contenders(length: int, window: int) -> Iterator[tuple[str, Attention, bool]]:
    """Name, attention, and whether its backward is timed too."""

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        del b, h
        return (i >= j) & ((i - j < window) | (j < SINKS))

    def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    yield "attnopt", partial(streaming_attention, sinks=SINKS, window=window), True
    blocks = create_block_mask(seen, None, None, length, length, device="cuda", _compile=True)
    yield "flex", partial(torch.compile(flex_attention, dynamic=False), block_mask=blocks), True
    yield "cudnn causal", cudnn, True
    if length <= LONGEST_DENSE:
        i, j = torch.arange(length, device="cuda")[:, None], torch.arange(length, device="cuda")[None]
        mask = (i >= j) & ((i - j < window) | (j < SINKS))
        yield "sdpa dense mask", partial(scaled_dot_product_attention, attn_mask=mask), False


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
    """Median; infinite where a contender does not take the shape."""
    try:
        time: float = do_bench(run, return_mode="median")
    except RuntimeError as error:
        print(f"does not run: {str(error).splitlines()[0]}", file=sys.stderr)
        return float("inf")
    return time


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
    q, k, v = (x.detach() for x in inputs_of(batch, length))
    problem = problem_of((q, k, v, None, None, None, None, 128**-0.5, 0, window, SINKS, 0, None, "zero"))
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--quick", action="store_true", help="a third of the checks, two shapes")
    parser.add_argument("--tune", action="store_true", help="also other tiles, at the first shape")
    chosen = parser.parse_args()
    checked = CHECKS[1::3] if chosen.quick else CHECKS
    payload: dict[str, object] = {"checks": (checks := list(check_all(checked)))}
    if chosen.tune:
        payload |= {"tiles": (tiles := tune(*SHAPES[0])), "fp32": (fp32 := exact_fp32())}
        table(tiles, "tiles")
        table(fp32, "fp32")
    payload["timings"] = (times := [timings(*shape) for shape in (SHAPES[:2] if chosen.quick else SHAPES)])
    write("streaming_gpu", payload, chosen.out)
    table([row for row in checks if not row["passed"]], "failed checks")
    print(f"\n{sum(row['passed'] for row in checks)} of {len(checks)} checks passed")
    table(times, "timings")
    return 0 if all(row["passed"] for row in checks) else 1


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
