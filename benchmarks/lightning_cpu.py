"""Linear attention without a GPU: lightning_attention against the N x N spelling, and how both grow with the length.

Claim: at N = 8,192 (B 1, H 8, D 64, fp32) at least 20 times as fast as N x N, and linear in time and memory from 1k
to 64k. Beside it the same chunks written in plain PyTorch and compiled by Inductor: what one gets by hand.
Each case runs in a process of its own, so that its peak memory is its own. Ratios are of the fastest runs, the least
disturbed ones.

    python benchmarks/lightning_cpu.py            writes benchmarks/results/lightning_cpu.json
    python benchmarks/lightning_cpu.py --quick    short lengths, writes nothing
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Callable

import torch
from _record import measure, write
from torch import Tensor

from attnopt.kernels.lightning.op import lightning_attention

BATCH, HEADS, DIM = 1, 8, 64
LENGTHS, EAGER_LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536), (1024, 2048, 4096, 8192)
COMPILED_LENGTHS = (1024, 8192)
QUICK_LENGTHS = (512, 1024)
LEAST_RATIO = 20
#: Rows of a chunk where chunks are written by hand: at 8,192 tokens 64 takes two minutes to compile, 256 is slower.
CHUNK = 128


def lightning(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, pairs: Tensor) -> Tensor:
    """attnopt's op."""
    del pairs
    return lightning_attention(q, k, v, log_decay=log_decay)


def eager(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, pairs: Tensor) -> Tensor:
    """N x N with the matrix of decays given: what building it costs is not counted against it."""
    del log_decay
    return ((q @ k.mT) * pairs) @ v


def by_hand(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, pairs: Tensor) -> Tensor:
    """Chunk by chunk in plain PyTorch; the lengths must be multiples of CHUNK."""
    del pairs
    age, g = torch.arange(1, CHUNK + 1), log_decay[:, None, None, None]
    distance = age[:, None] - age
    inside = torch.exp(g * distance.clamp_min(0)).masked_fill(distance < 0, 0.0)
    q, k, v = (x.unflatten(2, (-1, CHUNK)) for x in (q, k, v))
    state, entering = q.new_zeros(*q.shape[:2], DIM, DIM), []
    for delta in ((k * torch.exp(g * (CHUNK - age)[:, None])).mT @ v).unbind(2):
        entering.append(state)
        state = state * torch.exp(g[:, 0] * CHUNK) + delta
    read = (q * torch.exp(g * age[:, None])) @ torch.stack(entering, 2)
    return (((q @ k.mT) * inside) @ v + read).flatten(2, 3)


FORMS = {
    "lightning": lightning,
    "eager": eager,
    "compiled": torch.compile(by_hand, dynamic=False),
}


def decay_matrix(log_decay: Tensor, length: int) -> Tensor:
    """(H, N, N): exp(log_decay * (i - j)) on and below the diagonal, 0 above."""
    distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
    pairs = log_decay[:, None, None] * distance
    return pairs.masked_fill_(distance < 0, -torch.inf).exp_()


def prepare(form: str, length: int, *, with_backward: bool) -> Callable[[], None]:
    """The inputs, and a function that runs `form` on them."""
    torch.manual_seed(0)
    q, k, v, d_out = (torch.randn(BATCH, HEADS, length, DIM, requires_grad=with_backward) for _ in range(4))
    log_decay = -torch.linspace(0.01, 1.0, HEADS)
    pairs = decay_matrix(log_decay, length) if form == "eager" else torch.empty(0)

    def run() -> None:
        out = FORMS[form](q, k, v, log_decay, pairs)
        if with_backward:
            torch.autograd.grad(out, (q, k, v), d_out)

    return run


def run_case(form: str, length: int, *, with_backward: bool) -> dict[str, object]:
    """Times one case in this process; memory is what the peak rose by once libraries and inputs were there."""
    prepare(form, 128, with_backward=with_backward)()
    run = prepare(form, length, with_backward=with_backward)
    before = peak_bytes()
    seconds = measure(run, repeat=3 if form == "eager" else 9)
    return {
        "form": form,
        "length": length,
        "backward": with_backward,
        "seconds": seconds,
        "extra_peak_bytes": peak_bytes() - before,
    }


def peak_bytes() -> int:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_case_apart(form: str, length: int, *, with_backward: bool) -> dict[str, object]:
    """`run_case` in a fresh process."""
    command = [sys.executable, __file__, "--case", form, str(length), str(int(with_backward))]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(found.stdout)


def seconds_of(cases: list[dict], form: str, length: int, *, backward: bool = False) -> float:
    """The fastest run of one case."""
    wanted = (form, length, backward)
    return next(c["seconds"]["min"] for c in cases if (c["form"], c["length"], c["backward"]) == wanted)


def show(case: dict) -> None:
    """One line of the table."""
    seconds, what = case["seconds"], "forward+backward" if case["backward"] else "forward"
    spread = f"{seconds['min'] * 1e3:.1f} - {seconds['max'] * 1e3:.1f}"
    print(
        f"{case['form']:>9} N {case['length']:>6} {what:<16} {seconds['median'] * 1e3:>9.1f} ms ({spread}), "
        f"{case['extra_peak_bytes'] / 2**20:>7.0f} MiB"
    )


def summarise(cases: list[dict]) -> dict[str, object]:
    """The claim in numbers: ratios at 8,192, and the time per token at each length over that at the shortest."""
    both = {"forward": False, "forward_backward": True}
    return {
        f"{form}_over_lightning_at_8192": {
            name: seconds_of(cases, form, 8192, backward=b) / seconds_of(cases, "lightning", 8192, backward=b)
            for name, b in both.items()
        }
        for form in ("eager", "compiled")
    } | {
        "time_per_token_over_that_at_1024": {
            name: {
                str(n): per_token(cases, n, backward=b) / per_token(cases, 1024, backward=b) for n in LENGTHS
            }
            for name, b in both.items()
        }
    }


def per_token(cases: list[dict], length: int, *, backward: bool) -> float:
    """Seconds that attnopt's op takes for one token."""
    return seconds_of(cases, "lightning", length, backward=backward) / length


def run_all(lengths_of: dict[str, tuple[int, ...]]) -> list[dict]:
    """Every case, shown as it comes."""
    cases = []
    for form, lengths in lengths_of.items():
        for length in lengths:
            for with_backward in (False, True):
                cases.append(run_case_apart(form, length, with_backward=with_backward))
                show(cases[-1])
    return cases


def main() -> int:
    """0 if the claim holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short lengths; writes nothing")
    parser.add_argument("--case", nargs=3, metavar=("FORM", "LENGTH", "BACKWARD"), help="one case, as JSON")
    arguments = parser.parse_args()
    if arguments.case:
        form, length, with_backward = arguments.case
        print(json.dumps(run_case(form, int(length), with_backward=bool(int(with_backward)))))
        return 0
    if arguments.quick:
        run_all(dict.fromkeys(FORMS, QUICK_LENGTHS))
        return 0
    cases = run_all({"lightning": LENGTHS, "eager": EAGER_LENGTHS, "compiled": COMPILED_LENGTHS})
    summary = summarise(cases)
    shape = {"batch": BATCH, "heads": HEADS, "d": DIM, "dtype": "float32"}
    print(write("lightning_cpu", {"shape": shape, "summary": summary, "cases": cases}))
    print(json.dumps(summary))
    return 0 if min(summary["eager_over_lightning_at_8192"].values()) >= LEAST_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
