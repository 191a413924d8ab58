"""Linear attention on a GPU: correctness against fp64 on many shapes, then time beside its peers at the five shapes.

    python benchmarks/lightning_gpu.py --out lightning_gpu.json [--quick]

Peers, each where it is installed: fla's chunk_simple_gla, OpenNLPLab's lightning_attn_func, and cuDNN's causal softmax
attention (another function: what a dense model pays). Medians of triton.testing.do_bench, side by side in one run.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from _record import write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from attnopt.kernels.lightning.op import lightning_attention, lightning_step

#: B, N, H; D and Dv are 128, bf16, a fixed decay per head.
SHAPES = ((64, 1024, 16), (16, 4096, 16), (4, 16384, 16), (1, 65536, 16), (1, 262144, 16))
LONGEST_SOFTMAX = 65536

#: RMS of the error over RMS of the result.
BOUNDS = {torch.float32: 1e-5, torch.float16: 1.5e-3, torch.bfloat16: 6e-3}


@dataclass(frozen=True)
class Shape:
    """One correctness case."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    d: int
    dv: int
    decay: str = "head"
    state: bool = True


CHECKS = (
    Shape(1, 2, 2, 1, 64, 64),
    Shape(2, 4, 4, 63, 64, 64, "none"),
    Shape(2, 4, 2, 500, 64, 128),
    Shape(1, 16, 16, 4096, 128, 128),
    Shape(64, 16, 16, 256, 128, 128, state=False),
    Shape(1, 4, 4, 3001, 128, 128, "none"),
    Shape(2, 8, 8, 1000, 128, 128, "token"),
    Shape(1, 8, 1, 777, 96, 96, "token"),
    Shape(2, 3, 3, 129, 100, 60),
    Shape(1, 4, 4, 1025, 256, 256),
    Shape(1, 4, 4, 300, 17, 200),
)


# Correctness.


def inputs_of(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor | None]:
    """Normal numbers, in `dtype`; states and decays in fp32."""
    torch.manual_seed(0)
    s, make = shape, lambda *sizes: torch.randn(*sizes, device="cuda")
    decay = {"none": None, "head": make(s.heads), "token": make(s.batch, s.heads, s.length)}[s.decay]
    return {
        "q": make(s.batch, s.heads, s.length, s.d).to(dtype),
        "k": make(s.batch, s.kv_heads, s.length, s.d).to(dtype),
        "v": make(s.batch, s.kv_heads, s.length, s.dv).to(dtype),
        "log_decay": None if decay is None else -0.1 * decay.abs(),
        "initial_state": make(s.batch, s.heads, s.d, s.dv) if s.state else None,
    }


def results_of(given: dict[str, Tensor | None], d_out: Tensor, d_state: Tensor) -> dict[str, Tensor]:
    """Output, state and all gradients."""
    leaves = {name: x.detach().requires_grad_() for name, x in given.items() if x is not None}
    out, state = lightning_attention(**{**given, **leaves}, scale=0.2, return_state=True)
    found = torch.autograd.grad([out, state], list(leaves.values()), [d_out, d_state])
    return {"o": out, "state": state, **{f"d_{name}": x for name, x in zip(leaves, found, strict=True)}}


def errors_of(shape: Shape, dtype: torch.dtype) -> dict[str, float]:
    """Relative RMS errors against the same call in fp64, which takes the torch path."""
    given = inputs_of(shape, dtype)
    d_out = torch.randn(shape.batch, shape.heads, shape.length, shape.dv, device="cuda").to(dtype)
    d_state = torch.randn(shape.batch, shape.heads, shape.d, shape.dv, device="cuda")
    got = results_of(given, d_out, d_state)
    wide = {name: None if x is None else x.double() for name, x in given.items()}
    want = results_of(wide, d_out.double(), d_state.double())
    return {name: relative_error(x, want[name]) for name, x in got.items()}


def relative_error(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want|; infinite where something is not finite."""
    error = ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
    return error if torch.isfinite(got).all() else float("inf")


def check_all(shapes: tuple[Shape, ...]) -> list[dict[str, object]]:
    """One row a shape and dtype. The gradient of a decay cancels by nature: it may be ten times further off."""
    rows = []
    for shape in shapes:
        for dtype, bound in BOUNDS.items():
            errors = errors_of(shape, dtype)
            is_good = all(e <= bound * (10 if n == "d_log_decay" else 1) for n, e in errors.items())
            rows.append({"shape": str(shape), "dtype": str(dtype), "errors": errors, "good": is_good})
            worst = max(errors, key=errors.__getitem__)
            print(
                f"{'ok ' if is_good else 'BAD'} {dtype!s:<15} {worst} {errors[worst]:.1e} {shape}", flush=True
            )
    return rows


# Time.


def contenders(
    batch: int, length: int, heads: int
) -> dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]]:
    """Each peer as (function of q, k, v; its q, k, v in its own layout)."""
    q, k, v = (torch.randn(batch, heads, length, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    slope = torch.linspace(0.01, 0.5, heads, device="cuda")
    found = {"attnopt": (lambda q, k, v: lightning_attention(q, k, v, log_decay=-slope), (q, k, v))}
    if find_spec("fla"):
        from fla.ops.simple_gla import chunk_simple_gla

        turned = tuple(x.transpose(1, 2).contiguous() for x in (q, k, v))
        found["fla"] = (lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=-slope, scale=1.0)[0], turned)
    if find_spec("lightning_attn"):
        from lightning_attn.ops import lightning_attn_func

        found["lightning_attn"] = (
            lambda q, k, v: lightning_attn_func(q, k, v, slope.view(-1, 1, 1)),
            (q, k, v),
        )
    if length <= LONGEST_SOFTMAX:
        found["cudnn softmax"] = (softmax, (q, k, v))
    return found


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def time_one(
    run: Callable[..., Tensor], given: tuple[Tensor, ...], *, with_backward: bool
) -> dict[str, float]:
    """Median milliseconds, and the MiB that one call needs beyond its inputs."""
    leaves = tuple(x.detach().requires_grad_(with_backward) for x in given)
    d_out = torch.randn_like(run(*given))

    def once() -> object:
        out = run(*leaves)
        return torch.autograd.grad(out, leaves, d_out) if with_backward else out

    once()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once()
    torch.cuda.synchronize()
    extra = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {"ms": do_bench(once, return_mode="median"), "extra_mib": extra}


def time_all(shapes: tuple[tuple[int, int, int], ...]) -> list[dict[str, object]]:
    """One row a shape, direction and contender; a peer that fails is recorded with its error."""
    rows = []
    for batch, length, heads in shapes:
        for name, (run, given) in contenders(batch, length, heads).items():
            for with_backward in (False, True):
                row = {"shape": f"B{batch} N{length} H{heads} D128", "name": name, "backward": with_backward}
                rows.append({**row, **time_or_error(run, given, with_backward=with_backward)})
                print(rows[-1], flush=True)
        torch.cuda.empty_cache()
    return rows


def time_or_error(
    run: Callable[..., Tensor], given: tuple[Tensor, ...], *, with_backward: bool
) -> dict[str, object]:
    """`time_one`; out of memory and launch errors become data."""
    try:
        return dict(time_one(run, given, with_backward=with_backward))
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}


def time_steps() -> list[dict[str, object]]:
    """One token for B sequences of 32 heads: milliseconds, and the state's bytes read and written per second."""
    rows = []
    for batch in (1, 8, 64):
        q, k, v = (torch.randn(batch, 32, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        state = torch.zeros(batch, 32, 128, 128, device="cuda")
        decay = -torch.linspace(0.01, 0.5, 32, device="cuda")
        step = partial(lightning_step, q, k, v, state, log_decay=decay)
        ms = do_bench(step, return_mode="median")
        rows.append({"batch": batch, "ms": ms, "gb_per_s": 2 * state.nbytes / ms / 1e6})
    return rows


def show(rows: list[dict[str, object]], steps: list[dict[str, object]]) -> None:
    """The table: milliseconds, and attnopt's speed as a multiple of each peer's."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    print(f"\n{'':<32}" + "".join(f"{name:>24}" for name in names))
    for shape, backward in dict.fromkeys((row["shape"], row["backward"]) for row in rows):
        here = {
            r["name"]: r["ms"] for r in rows if (r["shape"], r["backward"]) == (shape, backward) and "ms" in r
        }
        own = here.get("attnopt", float("nan"))
        cells = (f"{here[n]:.3f} ms ({here[n] / own:.2f}x)" if n in here else "-" for n in names)
        print(f"{shape:<24}{'f+b' if backward else 'fwd':<8}" + "".join(f"{cell:>24}" for cell in cells))
    for row in steps:
        print(f"step B{row['batch']} H32 D128: {row['ms'] * 1e3:.1f} us, {row['gb_per_s']:.0f} GB/s")


def main() -> int:
    """0 if every shape is correct."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="where to write the JSON (default: results/lightning_gpu.json)"
    )
    parser.add_argument("--quick", action="store_true", help="four checks and two shapes")
    arguments = parser.parse_args()
    checks = check_all(CHECKS[:4] if arguments.quick else CHECKS)
    timings = time_all(SHAPES[1:4:2] if arguments.quick else SHAPES)
    steps = time_steps()
    show(timings, steps)
    print(write("lightning_gpu", {"checks": checks, "timings": timings, "steps": steps}, arguments.out))
    bad = [f"{row['shape']} {row['dtype']}" for row in checks if not row["good"]]
    print(f"{len(checks) - len(bad)} of {len(checks)} checks good", *bad, sep="\n  ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
