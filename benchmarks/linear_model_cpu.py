"""A TransNormer block written N x N, through attnopt and as it is: time and peak memory as the sequence grows.

The block (Qin et al. 2023, arXiv:2307.14995, section 3; the sizes are those of Lightning Attention-2's CPU case) is
plain PyTorch: the decay exp(-slope * (i - j)) is computed in the graph and multiplied onto Q K^T. attnopt reads that.
Claim: at N = 8,192 (B 1, H 8, D 64, fp32) at least 10 times as fast as eager, and linear in time from 8k to 32k.
Each case runs in a process of its own, so that its peak memory is its own; compiling is not counted in the times.

    python benchmarks/linear_model_cpu.py            writes benchmarks/results/linear_model_cpu.json
    python benchmarks/linear_model_cpu.py --quick    short lengths, writes nothing
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from _record import measure, write
from torch import Tensor, nn
from torch.nn import functional

import attnopt

BATCH, HEADS, DIM = 1, 8, 64
LENGTHS, EAGER_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768), (1024, 2048, 4096, 8192)
QUICK_LENGTHS = (256, 512)


class Block(nn.Module):
    """x (B, N, H * D) -> the same shape: gated linear attention with a decay per head, then a gated feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * DIM
        self.project = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)
        self.register_buffer("slopes", 2.0 ** -torch.arange(1, HEADS + 1))

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        x = x + self.attend(normalised(x))
        up, gate = self.up(normalised(x)).chunk(2, -1)
        return x + self.down(up * gate)

    def attend(self, x: Tensor) -> Tensor:
        """silu(Q) silu(K)^T * decay, times V, normalised and gated."""
        q, k, v, gate = self.project(x).chunk(4, -1)
        q, k, v = (
            y.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for y in (functional.silu(q), functional.silu(k), v)
        )
        at = torch.arange(x.shape[1], device=x.device)
        distance = at[:, None] - at[None, :]
        decay = torch.exp(-self.slopes[:, None, None] * distance).masked_fill(distance < 0, 0.0)
        mixed = ((q @ k.transpose(-1, -2)) * decay) @ v
        return self.out(normalised(mixed.transpose(1, 2).flatten(2)) * torch.sigmoid(gate))


def normalised(x: Tensor) -> Tensor:
    """SRMSNorm: x / rms(x), without weights."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def attention_of_last_report() -> str:
    """What became of the block's attention."""
    (site,) = attnopt.reports()[-1].attention
    return f"{site.verdict} {site.kernel}: {site.spec}"


def prepare(form: str, length: int) -> Callable[[], Tensor]:
    """A function that runs one forward of the block."""
    torch.manual_seed(0)
    block = Block().eval()
    x = torch.randn(BATCH, length, HEADS * DIM)
    run = torch.compile(block, backend="attnopt") if form == "attnopt" else block

    def forward() -> Tensor:
        with torch.no_grad():
            return run(x)

    return forward


def run_case(form: str, length: int) -> dict[str, object]:
    """Times one case in this process; memory is what the peak rose by once libraries and the compiler were there."""
    prepare(form, 128)()
    run = prepare(form, length)
    before, start = peak_bytes(), time.perf_counter()
    run()
    first = time.perf_counter() - start
    case = {
        "form": form,
        "length": length,
        "first_run_seconds": first,
        "seconds": measure(run, repeat=3 if form == "eager" else 9),
        "extra_peak_bytes": peak_bytes() - before,
        "norm": run().double().norm().item(),
    }
    return case | ({"site": attention_of_last_report()} if form == "attnopt" else {})


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_case_apart(form: str, length: int) -> dict[str, object]:
    """`run_case` in a fresh process."""
    command = [sys.executable, __file__, "--case", form, str(length)]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])


def show(case: dict) -> None:
    """One line of the table."""
    seconds = case["seconds"]
    spread = f"{seconds['min'] * 1e3:.1f} - {seconds['max'] * 1e3:.1f}"
    print(
        f"{case['form']:>8} N {case['length']:>6} {seconds['median'] * 1e3:>9.1f} ms ({spread}), "
        f"{case['extra_peak_bytes'] / 2**20:>7.0f} MiB, first run {case['first_run_seconds']:.1f} s "
        f"{case.get('site', '')}"
    )


def run_all(lengths: tuple[int, ...], eager_lengths: tuple[int, ...]) -> list[dict]:
    """Every case, shown as it comes."""
    cases = []
    for form, own_lengths in (("attnopt", lengths), ("eager", eager_lengths)):
        for length in own_lengths:
            cases.append(run_case_apart(form, length))
            show(cases[-1])
    return cases


def summarise(cases: list[dict]) -> dict[str, object]:
    """The claim in numbers: ratio at 8,192; time per token at the longest length over that at 8,192; agreement."""
    held = {(c["form"], c["length"]): c for c in cases}
    seconds = {key: case["seconds"]["median"] for key, case in held.items()}
    longest = max(LENGTHS)
    norms = [(held["attnopt", n]["norm"], held["eager", n]["norm"]) for n in EAGER_LENGTHS]
    return {
        "speedup_at_8192": seconds["eager", 8192] / seconds["attnopt", 8192],
        "time_per_token_32768_over_8192": seconds["attnopt", longest]
        / seconds["attnopt", 8192]
        / (longest / 8192),
        "peak_bytes_at_8192": {form: held[form, 8192]["extra_peak_bytes"] for form in ("attnopt", "eager")},
        "largest_relative_difference_of_the_norm": max(abs(a - b) / b for a, b in norms),
    }


def main() -> int:
    """0 if the claim holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short lengths; writes nothing")
    parser.add_argument("--case", nargs=2, metavar=("FORM", "LENGTH"), help="one case, as JSON")
    arguments = parser.parse_args()
    if arguments.case:
        form, length = arguments.case
        print(json.dumps(run_case(form, int(length))))
        return 0
    if arguments.quick:
        run_all(QUICK_LENGTHS, QUICK_LENGTHS)
        return 0
    cases = run_all(LENGTHS, EAGER_LENGTHS)
    summary = summarise(cases)
    shape = {"batch": BATCH, "heads": HEADS, "d": DIM, "dtype": "float32"}
    print(write("linear_model_cpu", {"shape": shape, "summary": summary, "cases": cases}))
    print(json.dumps(summary))
    return 0 if summary["speedup_at_8192"] >= 10 else 1


if __name__ == "__main__":
    sys.exit(main())
