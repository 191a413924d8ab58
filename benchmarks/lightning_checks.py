"""Linear attention on a GPU where sizes are extreme: right to a million tokens, and beyond 2^31 elements.

    python benchmarks/lightning_checks.py [--interpreted] [--only GROUP ...]

Each result is judged row by row against fp64 (the torch path, on the GPU): the error of a row over what rounding to its
dtype allows, 2 roundings for outputs and 3 for gradients. One line per group, each check that is bad, and a last line
"N of M checks good"; the exit code is 1 if any is bad. About two minutes and 60 GB on an H100.

--interpreted: small sizes, on the CPU, with kernels interpreted (start it with TRITON_INTERPRET=1): checks the script.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from _lightning_checks import LARGE, SMALL, Check, Excess, Sizes, computed, excesses
from lightning_cases import Case, make_case
from lightning_judging import attend, backward, forward, results
from torch import Tensor
from triton.errors import TritonError

from attnopt.kernels.lightning import triton_step

# A million tokens.


def long_decays(length: int, device: str) -> dict[str, Tensor | None]:
    """Decays of one batch and two heads, from none at all to forgetting at once."""
    ramp = torch.rand(1, 2, length, device=device, dtype=torch.float64)
    rare = torch.where(torch.arange(length, device=device) % 4099 == 17, -math.inf, -1e-5).double()
    heads = {
        "head, lambda -> 1": (-1e-6, -1e-9),
        "head, 1 and 0": (0.0, -1000.0),
        "head, lambda -> 0": (-8.0, -math.inf),
    }
    made = {name: torch.tensor(x, device=device, dtype=torch.float64) for name, x in heads.items()}
    return {
        "none": None,
        **made,
        "token, lambda -> 1": -1e-6 * ramp,
        "token, lambda -> 0": -10.0 * ramp,
        "token, from 1 to 0": -(10.0 ** (4 * ramp - 3)),
        "token, resets": rare.expand(1, 2, -1).contiguous(),
    }


#: Decays under which a million values add up.
UNFADING = ("none", "head, lambda -> 1", "head, 1 and 0", "token, lambda -> 1")


def million_tokens(sizes: Sizes) -> Iterator[Check]:
    """All results and gradients at a million tokens."""
    for dtype in sizes.dtypes:
        for name in long_decays(1, "cpu"):
            run = partial(million_excess, sizes, dtype, name)
            yield Check("a million tokens", f"{dtype} {name}", run)


def million_excess(sizes: Sizes, dtype: torch.dtype, name: str) -> Excess:
    """Positive numbers, so that nothing cancels; sums of a million of them are within what fp16 holds."""
    with torch.device(sizes.device):
        d = sizes.width
        case = make_case(
            sizes.million, batch=1, kv_heads=2, share=1, d=d, dv=d, decay="none", scale=1 / d, signed=False
        )
    if name in UNFADING:
        case = replace(case, v=case.v / 32, d_out=case.d_out / 32)
    low = replace(case, log_decay=long_decays(sizes.million, sizes.device)[name]).in_rounded(dtype)
    got = computed(low, sizes)
    return excesses(got, results(attend, low.map(Tensor.double)), dtype)


# More than 2^31 elements.


def large_sizes(sizes: Sizes) -> Iterator[Check]:
    """By the length of the sequence, by the number of heads, and of states."""
    group, d = "beyond 2^31 by size", 128 if not sizes.interpreted else 16
    rows = sizes.elements // d + 1
    for dtype, decay in ((torch.bfloat16, "token"), (torch.bfloat16, "head"), (torch.float32, "head")):
        if dtype in sizes.dtypes or not sizes.interpreted:
            kind = dtype if dtype in sizes.dtypes else torch.float16
            run = partial(long_excess, sizes, kind, decay, rows // 3 + 700, d)
            yield Check(group, f"{kind} {decay}, long sequence", run)
    for dtype in sizes.dtypes[:1]:
        run = partial(heads_excess, sizes, dtype, rows // 1000 + 2, 1000, d)
        yield Check(group, f"{dtype} many heads", run)
    yield Check(group, "one-token step", partial(step_excess, sizes))


def forgetful_case(sizes: Sizes, dtype: torch.dtype, decay: str, shape: tuple[int, ...]) -> Case:
    """(B, H, S, D): q, k, v and d_out are one tensor; what is 200 rows away weighs nothing."""
    x = torch.rand(shape, device=sizes.device, dtype=dtype).add_(0.5)
    kind = (shape[1],) if decay == "head" else shape[:3]
    log_decay = torch.full(kind, -0.5, device=sizes.device)
    none = torch.zeros(shape[0], shape[1], shape[3], shape[3], device=sizes.device)
    return Case(x, x, x, log_decay, None, 1 / shape[3], x, none)


def directly(case: Case, *, with_log_decay: bool) -> dict[str, Tensor]:
    """Output, state and gradients without autograd, which would keep more than there is room for."""
    out, state = forward(case)
    found = backward(case, with_log_decay=with_log_decay)
    return {"out": out, "state": state, **{f"d_{name}": x for name, x in found.items()}}


def long_excess(sizes: Sizes, dtype: torch.dtype, decay: str, length: int, d: int) -> Excess:
    """Three heads; compares rows at the start, around element 2^31 and at the end of each."""
    case = forgetful_case(sizes, dtype, decay, (1, 3, length, d))
    got = directly(case, with_log_decay=decay == "token")
    border = sizes.border
    middle = (sizes.elements // d) % length
    found: Excess = {}
    for place in sorted({0, length // 2, middle, length - border}):
        start = max(0, min(place - border // 2, length - border))
        part = {
            n: x[:, :, start : start + border] for n, x in got.items() if n not in ("state", "d_log_decay")
        }
        if "d_log_decay" in got:
            part["d_log_decay"] = got["d_log_decay"][:, :, start : start + border]
        window, offset = around(case, start, border)
        exact = results(attend, window.map(Tensor.double))
        cut = {n: exact[n][:, :, offset : offset + border] for n in part}
        found |= {f"{n} at {start}": e for n, e in excesses(part, cut, dtype).items()}
    return found


def around(case: Case, start: int, border: int) -> tuple[Case, int]:
    """The rows of a case from which rows start .. start + border follow, and where these lie in it."""
    first = max(0, start - 4 * border)
    return case.rows(first, start + 5 * border), start - first


def heads_excess(sizes: Sizes, dtype: torch.dtype, heads: int, length: int, d: int) -> Excess:
    """Many sequences; compares the first, the one around element 2^31 and the last."""
    case = forgetful_case(sizes, dtype, "token", (heads // 8 + 1, 8, length, d))
    got = directly(case, with_log_decay=True)
    found: Excess = {}
    for b in (0, sizes.elements // (8 * length * d), case.q.shape[0] - 1):
        one = case.map(lambda x, b=b: x[b : b + 1])
        exact = results(attend, one.map(Tensor.double))
        part = {n: x[b : b + 1] for n, x in got.items()}
        found |= {f"{n} of batch {b}": e for n, e in excesses(part, exact, dtype).items()}
    return found


def step_excess(sizes: Sizes) -> Excess:
    """A state of more than 2^31 elements; compares its first and last rows."""
    d, dtype = (256, torch.bfloat16) if not sizes.interpreted else (16, torch.float16)
    batch = sizes.elements // (8 * d * d) + 2
    q, k, v = (torch.rand(batch, 8, d, device=sizes.device, dtype=dtype) for _ in range(3))
    state = torch.rand(batch, 8, d, d, device=sizes.device)
    ends = torch.tensor([0, batch // 2, batch - 2, batch - 1], device=sizes.device)
    exact = state[ends].double() + k[ends].double()[..., None] * v[ends].double()[..., None, :]
    out = triton_step.step(q, k, v, state, None, 1 / d)
    want = (q[ends].double()[..., None, :] @ exact)[..., 0, :] / d
    return excesses({"out": out[ends], "state": state[ends]}, {"out": want, "state": exact}, dtype)


def large_strides(sizes: Sizes) -> Iterator[Check]:
    """Small tensors whose rows, heads or batches lie far apart; start 0 takes descriptors, start 1 pointers."""
    group, dtype = "beyond 2^31 by stride", sizes.dtypes[0]
    for dim, name in enumerate(("batch", "head", "row")):
        for shift in (0, 1):
            yield Check(
                group, f"{name} stride, start {shift}", partial(stride_excess, sizes, dtype, dim, shift)
            )


def stride_excess(sizes: Sizes, dtype: torch.dtype, dim: int, shift: int) -> Excess:
    """q, k, v and d_out are one view of a buffer of 5 GB."""
    d, other = 16, 3
    far, count = sizes.elements // sizes.far_apart, sizes.far_apart + 7
    shape = [other, other, 70, d]
    shape[dim] = count
    strides = [far, 70 * d, d, 1] if dim == 0 else [70 * d, far, d, 1]
    if dim == 2:
        strides = [other * d, d, far, 1]
    buffer = torch.empty(far * count + other * 70 * d + 8, device=sizes.device, dtype=dtype)
    x = buffer[shift:].as_strided(shape, strides)
    x.copy_(torch.rand(shape, device=sizes.device).add_(0.5))
    decay = -torch.rand(shape[1], device=sizes.device)
    state = torch.rand(*shape[:2], d, d, device=sizes.device)
    case = Case(x, x, x, decay, state, 1 / d, x, state)
    exact = results(attend, case.map(lambda x: x.double()))
    return excesses(computed(case, sizes), exact, dtype)


# The run.


GROUPS = {"million": million_tokens, "size": large_sizes, "stride": large_strides}


def judge(check: Check) -> tuple[float, str]:
    """The worst excess of a check and where it is; an error is a bad check, not the end."""
    try:
        found = check.run()
    except (RuntimeError, ValueError, TypeError, AssertionError, TritonError) as error:
        return math.inf, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    worst = max(found, key=found.__getitem__)
    return found[worst], worst


def run_group(checks: list[Check]) -> int:
    """Prints the line of a group and its bad checks; returns how many are good."""
    start, good, worst = time.perf_counter(), 0, (0.0, "")
    bad = []
    for check in checks:
        value, where = judge(check)
        good += value <= 1.0
        worst = max(worst, (value, f"{check.name}: {where}"))
        bad += [f"  BAD {check.name}: {where}, {value:.3g} times the allowance"] if not value <= 1.0 else []
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    seconds = time.perf_counter() - start
    print(
        f"{checks[0].group}: {good} of {len(checks)} good, worst {worst[0]:.2f} ({worst[1]}), {seconds:.0f} s"
    )
    print(*bad, sep="\n", end="\n" if bad else "", flush=True)
    return good


def main() -> int:
    """0 if every check is good."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--interpreted", action="store_true", help="small, on the CPU")
    parser.add_argument("--only", nargs="+", choices=sorted(GROUPS), default=list(GROUPS))
    arguments = parser.parse_args()
    if not (arguments.interpreted or torch.cuda.is_available()):
        print("left out: no CUDA device is here")
        return 0
    torch.manual_seed(0)
    sizes = SMALL if arguments.interpreted else LARGE
    groups = [list(GROUPS[name](sizes)) for name in arguments.only]
    good, total = sum(run_group(checks) for checks in groups), sum(map(len, groups))
    print(f"{good} of {total} checks good")
    return 0 if good == total else 1


if __name__ == "__main__":
    sys.exit(main())
