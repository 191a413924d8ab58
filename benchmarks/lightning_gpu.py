"""Linear attention on a GPU: time beside its peers at five shapes, from 1k to 1M tokens, and of one decoding step.

    python benchmarks/lightning_gpu.py --out lightning_gpu.json [--quick]

Peers, each where it is installed: fla's chunk_simple_gla, OpenNLPLab's lightning_attn_func, and cuDNN's causal softmax
attention (another function: what a dense model pays). All in one run, each the median of replays of a CUDA graph:
launches and Python are left out, for every contender alike; `called_ms` is the same without a graph. Correctness has a
script of its own, lightning_checks.py; here each timed output is compared with fp64 on its first rows.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from _gpu_time import copy_rate, replayed, replayed_in_turn
from _record import write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton.testing import do_bench

from attnopt.kernels.lightning import chunked
from attnopt.kernels.lightning.op import lightning_attention, lightning_step

#: B, N, H; D and Dv are 128, bf16, a fixed decay per head.
SHAPES = ((64, 1024, 16), (16, 4096, 16), (4, 16384, 16), (1, 65536, 16), (1, 262144, 16))
LONGEST_SOFTMAX = 65536

#: Passes over a tensor of q's size that the least possible kernel makes: q, k, v, o; and with dO, dq, dk, dv again.
PASSES = {False: 4, True: 11}

#: Tokens of the runs at a constant total, and their lengths.
TOTAL = 2**20
LENGTHS = (2**10, 2**12, 2**14, 2**16, 2**18, 2**20)

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class Contender:
    """A function of q, k, v, and its q, k, v in its own layout."""

    run: Run
    given: tuple[Tensor, ...]


def slopes(heads: int) -> Tensor:
    """A decay per head, from 0.01 to 0.5 in natural logarithm."""
    return torch.linspace(0.01, 0.5, heads, device="cuda")


def normal(*sizes: int) -> tuple[Tensor, ...]:
    """q, k, v."""
    return tuple(torch.randn(*sizes, device="cuda", dtype=torch.bfloat16) for _ in range(3))


def contenders(batch: int, length: int, heads: int) -> dict[str, Contender]:
    """Ours, and each peer that is installed."""
    q, k, v = normal(batch, heads, length, 128)
    slope = slopes(heads)
    found = {"attnopt": Contender(partial(lightning_attention, log_decay=-slope), (q, k, v))}
    if find_spec("fla"):
        from fla.ops.simple_gla import chunk_simple_gla

        turned = tuple(x.transpose(1, 2).contiguous() for x in (q, k, v))
        found["fla"] = Contender(
            lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=-slope, scale=1.0)[0], turned
        )
    if find_spec("lightning_attn"):
        from lightning_attn.ops import lightning_attn_func

        found["lightning_attn"] = Contender(
            lambda q, k, v: lightning_attn_func(q, k, v, slope.view(-1, 1, 1)), (q, k, v)
        )
    if length <= LONGEST_SOFTMAX:
        found["cudnn softmax"] = Contender(softmax, (q, k, v))
    return found


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=True)


# Time.


def call_of(
    contender: Contender, *, with_backward: bool, d_out: Tensor | None = None
) -> Callable[[], object]:
    """One forward, or one forward and its gradients, those of `d_out` where it is given."""
    if not with_backward:
        return torch.no_grad()(lambda: contender.run(*contender.given))
    leaves = tuple(x.detach().requires_grad_() for x in contender.given)
    d_out = torch.randn_like(contender.run(*contender.given)) if d_out is None else d_out
    return lambda: torch.autograd.grad(contender.run(*leaves), leaves, d_out)


def time_or_error(contender: Contender, *, with_backward: bool) -> dict[str, object]:
    """Times in a graph and outside, and the MiB that a call needs beyond its inputs.

    Out of memory and launch errors become data.
    """
    try:
        once = call_of(contender, with_backward=with_backward)
        once()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        once()
        torch.cuda.synchronize()
        extra = (torch.cuda.max_memory_allocated() - before) / 2**20
        called = do_bench(once, warmup=10, rep=40, return_mode="median")
        return {**replayed(once), "called_ms": called, "extra_mib": extra}
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}


def time_shape(batch: int, length: int, heads: int, rate: float) -> list[dict[str, object]]:
    """One row a direction and contender; a peer that fails is recorded with its error."""
    found = contenders(batch, length, heads)
    rows = []
    for with_backward in (False, True):
        shared = {"shape": f"B{batch} N{length} H{heads} D128", "backward": with_backward}
        floor = PASSES[with_backward] * found["attnopt"].given[0].nbytes / rate * 1e3
        for name, contender in found.items():
            row = {"name": name, **shared, **time_or_error(contender, with_backward=with_backward)}
            if "ms" in row:
                row["share_of_copy"] = floor / row["ms"]
            rows.append(row)
            print(row, flush=True)
        torch.cuda.empty_cache()
    rows[0]["error_first_rows"] = error_of(found["attnopt"])
    return rows


def error_of(contender: Contender) -> float:
    """|out - exact| / |exact| on the first batch row's first 512 tokens, against fp64."""
    q, k, v = (x[:1, :, :512].double() for x in contender.given)
    exact = chunked.forward(q, k, v, -slopes(q.shape[1]).double(), None, 1.0)[0]
    got = contender.run(*contender.given)[:1, :, :512].double()
    return ((got - exact).norm() / exact.norm()).item()


def time_lengths(lengths: tuple[int, ...], heads: int = 16) -> list[dict[str, object]]:
    """The same tokens, cut into ever longer sequences, which take turns: a card at its power limit slows with time."""
    flat, rows = (*normal(TOTAL * heads * 128), *normal(TOTAL * heads * 128)[:1]), []
    runs = {"decay": partial(lightning_attention, log_decay=-slopes(heads)), "no decay": lightning_attention}
    for (name, run), with_backward in product(runs.items(), (False, True)):
        given = [tuple(x.view(TOTAL // n, heads, n, 128) for x in flat) for n in lengths]
        calls = [call_of(Contender(run, x[:3]), with_backward=with_backward, d_out=x[3]) for x in given]
        found = replayed_in_turn(calls, repeat=15)
        rows += [
            {"length": n, "name": name, "backward": with_backward, **times}
            for n, times in zip(lengths, found, strict=True)
        ]
        del calls
        torch.cuda.empty_cache()
    return rows


def time_steps(rate: float) -> list[dict[str, object]]:
    """One token for B sequences of 32 heads, the state read and written once; states rotate beyond the L2 cache."""
    rows = []
    for batch in (1, 8, 32, 64):
        q, k, v = (x[:, :, 0] for x in normal(batch, 32, 1, 128))
        states = [torch.zeros(batch, 32, 128, 128, device="cuda") for _ in range(max(2, 256 // batch // 2))]
        decay = -slopes(32)

        found = replayed(partial(step_all, q, k, v, states, decay), inner=1)
        found = {name: ms / len(states) for name, ms in found.items()}
        called = do_bench(partial(lightning_step, q, k, v, states[0], log_decay=decay), return_mode="median")
        share = 2e3 * states[0].nbytes / found["ms"] / rate
        rows.append({"batch": batch, "heads": 32, **found, "called_ms": called, "share_of_copy": share})
    return rows


def step_all(q: Tensor, k: Tensor, v: Tensor, states: list[Tensor], decay: Tensor) -> None:
    """One step of each state."""
    for state in states:
        lightning_step(q, k, v, state, log_decay=decay)


# What is shown.


def show(rows: list[dict[str, object]]) -> None:
    """The table: milliseconds, and attnopt's speed as a multiple of each peer's."""
    names = list(dict.fromkeys(row["name"] for row in rows))
    print(f"\n{'':<32}" + "".join(f"{name:>24}" for name in names))
    for shape, backward in dict.fromkeys((row["shape"], row["backward"]) for row in rows):
        here = {r["name"]: r for r in rows if (r["shape"], r["backward"]) == (shape, backward) and "ms" in r}
        own = here["attnopt"]
        cells = (
            f"{here[n]['ms']:.3f} ms ({here[n]['ms'] / own['ms']:.2f}x)" if n in here else "-" for n in names
        )
        print(
            f"{shape:<24}{'f+b' if backward else 'fwd':<8}" + "".join(f"{cell:>24}" for cell in cells), end=""
        )
        print(f"  {own['share_of_copy']:.0%} of copy")


def show_lengths(rows: list[dict[str, object]]) -> None:
    """Milliseconds by length, one line a kind."""
    for name, backward in dict.fromkeys((row["name"], row["backward"]) for row in rows):
        here = [row for row in rows if (row["name"], row["backward"]) == (name, backward)]
        cells = (f"{row['length']}: {row['ms']:.2f}" for row in here)
        print(f"{TOTAL} tokens, {name}, {'f+b' if backward else 'fwd'}, ms  ", *cells, sep="  ")


def main() -> int:
    """0 if every timed output is right."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="where to write the JSON (default: results/lightning_gpu.json)"
    )
    parser.add_argument("--quick", action="store_true", help="two shapes, three lengths")
    arguments = parser.parse_args()
    rate = copy_rate()
    print(f"{torch.cuda.get_device_name()}, copy {rate / 1e12:.2f} TB/s", flush=True)
    steps = time_steps(rate)
    lengths = time_lengths(LENGTHS[::2] if arguments.quick else LENGTHS)
    payload = {"copy_bytes_per_second": rate, "timings": [], "lengths": lengths, "steps": steps}
    for shape in SHAPES[1:4:2] if arguments.quick else SHAPES:
        payload["timings"] += time_shape(*shape, rate)
        path = write("lightning_gpu", payload, arguments.out)
    timings = payload["timings"]
    print(path)
    show(timings)
    show_lengths(lengths)
    for row in steps:
        print(f"step B{row['batch']} H32 D128: {row['ms'] * 1e3:.1f} us, {row['share_of_copy']:.0%} of copy")
    bad = [row["shape"] for row in timings if row.get("error_first_rows", 0.0) > 6e-3]
    print("wrong:", bad or "none")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
