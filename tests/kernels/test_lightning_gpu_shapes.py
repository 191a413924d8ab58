"""Linear attention on a GPU, row by row against fp64, on some 1,500 shapes.

Each test takes shapes that share their compiled kernels and names every one that is wrong. The yardstick in fp64 is the
torch path, which is itself held to the recurrence here.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from lightning_cases import LAYOUTS, Case, make_case, recurrence
from lightning_judging import attend, faults, results
from torch import Tensor

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
DECAYS = ("none", "head", "token")
CHUNK = 64

EQUAL = tuple((d, d) for d in (16, 32, 40, 64, 80, 96, 128, 192, 256))
UNEQUAL = ((16, 64), (64, 128), (128, 32), (40, 96), (96, 40), (256, 80), (80, 192), (192, 256))
#: Pairs of widths and dtypes: each one is a set of kernels to compile, so not every pair comes in every dtype.
WIDTHS = [
    *((torch.bfloat16, *pair) for pair in (*EQUAL, *UNEQUAL)),
    *((torch.float16, *pair) for pair in ((64, 64), (128, 128), *UNEQUAL)),
    *((torch.float32, *pair) for pair in ((64, 64), (128, 128), *UNEQUAL)),
]

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
in_half = pytest.mark.parametrize("dtype", HALF)


def on_device(length: int, **changes: object) -> Case:
    """A case made where it is used; products of a row and a key are about 1, so that fp16 holds all sums."""
    width = max(int(changes.get("d", 8)), int(changes.get("dv", 8)))
    with torch.device(DEVICE):
        return make_case(length, **{"scale": 1.0 / width, "signed": False, **changes})


def with_layout(name: str, *tensors: str) -> Callable[[Case], Case]:
    """Lays the named tensors of a case out in memory; all of rank 4 if none is named."""
    chosen = tensors or ("q", "k", "v", "d_out", "initial_state", "d_state")

    def laid(case: Case) -> Case:
        found = {n: getattr(case, n) for n in chosen}
        return replace(case, **{n: LAYOUTS[name](x) for n, x in found.items() if x is not None})

    return laid


def expect_none(found: list[str]) -> None:
    """No faults; says how many there are and the first of them."""
    assert not found, f"{len(found)} faults:\n" + "\n".join(found[:20])


# The yardstick.


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 2 * CHUNK + 1])
def test_the_torch_path_is_the_recurrence_in_fp64(length: int, decay: str) -> None:
    case = on_device(length, d=32, dv=48, kv_heads=2, decay=decay, signed=True)
    torch.testing.assert_close(results(attend, case), results(recurrence, case), rtol=1e-9, atol=1e-9)


# Lengths.


@every_dtype
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("start", "stop"), [(0, 17), (17, 33), (33, 82), (82, 2 * CHUNK + 2)])
def test_every_length_up_to_two_chunks_is_right(dtype, decay: str, start: int, stop: int) -> None:
    def all_cases() -> Iterator[tuple[str, Case]]:
        for length in range(start, stop):
            case = on_device(length, d=32, dv=32, kv_heads=2, share=1, batch=1 + length % 3, decay=decay)
            yield f"S {length}", case

    expect_none(faults(all_cases(), dtype))


# Widths.


@pytest.mark.parametrize(("dtype", "d", "dv"), WIDTHS)
def test_every_width_is_right(dtype, d: int, dv: int) -> None:
    """Shared heads, and lengths of one chunk, of several, and of several segments."""
    place = WIDTHS.index((dtype, d, dv))
    decay = DECAYS[place % 3]
    # In fp32 a product may cancel, and so may the one number that a head's decay gets.
    sizes = {"d": d, "dv": dv, "decay": decay, "signed": dtype in HALF and decay != "head"}
    heads = {"kv_heads": 2, "share": 1 + place % 2}

    def all_cases() -> Iterator[tuple[str, Case]]:
        for length in (65, 127, 191, 777):
            for batch in (1, 3):
                yield f"B {batch} S {length} {sizes}", on_device(length, batch=batch, **sizes, **heads)

    expect_none(faults(all_cases(), dtype))


@every_dtype
def test_odd_widths_are_right(dtype) -> None:
    widths = ((1, 1), (3, 17), (17, 200))
    cases = ((f"D {d} Dv {dv}", on_device(150, d=d, dv=dv)) for d, dv in widths)
    expect_none(faults(cases, dtype))


# Heads.


@in_half
@pytest.mark.parametrize(("kv_heads", "share"), [(1, 1), (1, 8), (3, 5), (150, 2)])
def test_any_sharing_of_heads_is_right(dtype, kv_heads: int, share: int) -> None:
    def all_cases() -> Iterator[tuple[str, Case]]:
        for length in (90, 600):
            case = on_device(length, d=32, dv=32, batch=1, kv_heads=kv_heads, share=share, decay="token")
            yield f"S {length}", case

    expect_none(faults(all_cases(), dtype))


# Decay.


@every_dtype
@pytest.mark.parametrize("decay", ["head", "token"])
def test_any_strength_of_decay_is_right(dtype, decay: str) -> None:
    """From hardly any to forgetting everything; long enough that the first pass skips faded rows."""

    def all_cases() -> Iterator[tuple[str, Case]]:
        for rate in (0.0, 1e-7, 1e-4, 0.01, 1.0, 3.0, 20.0, 200.0, 1e30):
            for length in (130, 2500):
                case = on_device(length, d=32, dv=32, kv_heads=3, share=1, batch=1, decay=decay, rate=rate)
                yield f"rate {rate} S {length}", case

    expect_none(faults(all_cases(), dtype))


@every_dtype
def test_heads_of_very_different_decay_do_not_blur_each_other(dtype) -> None:
    rates = torch.tensor([0.0, 1e-6, 1e-3, 0.1, 1.0, 10.0, 90.0, 1000.0], device=DEVICE, dtype=torch.float64)
    case = on_device(2500, d=32, dv=32, batch=1, kv_heads=8, share=1)
    expect_none(faults([("head", replace(case, log_decay=-rates))], dtype))
    wave = torch.where(torch.arange(2500, device=DEVICE) % 97 == 0, -300.0, -0.01).double()
    expect_none(faults([("token", replace(case, log_decay=wave.expand(1, 8, -1)))], dtype))


@every_dtype
@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-3])
def test_any_scale_is_right(dtype, scale: float) -> None:
    cases = ((f"S {n}", on_device(n, d=32, dv=32, kv_heads=2, share=1, scale=scale)) for n in (90, 777))
    expect_none(faults(cases, dtype))


# States.


@every_dtype
@pytest.mark.parametrize("decay", DECAYS)
def test_no_initial_state_is_one_of_zeros(dtype, decay: str) -> None:
    cases = (
        (f"S {n}", on_device(n, d=32, dv=32, kv_heads=2, share=1, decay=decay, with_state=False))
        for n in (1, 40, 90, 777)
    )
    expect_none(faults(cases, dtype))


# Memory.


@every_dtype
@pytest.mark.parametrize("layout", ["transposed", "columns first", "sliced", "padded"])
def test_any_layout_is_right(dtype, layout: str) -> None:
    """`transposed` keeps tensor descriptors; the others fall back to pointers, also where one tensor alone wants it."""
    sizes = {"d": 64, "dv": 64, "kv_heads": 2, "share": 1, "decay": "head"}

    def all_cases() -> Iterator[tuple[str, Case]]:
        for length in (65, 777):
            yield f"S {length}", on_device(length, **sizes)

    expect_none(faults(all_cases(), dtype, laid=with_layout(layout)))
    expect_none(faults(all_cases(), dtype, laid=with_layout(layout, "v")))


@in_half
@pytest.mark.parametrize("shift", [1, 4, 8])
def test_any_start_in_memory_is_right(dtype, shift: int) -> None:
    """8 elements are the 16 bytes that descriptors want; fewer are not."""

    def shifted(x: Tensor) -> Tensor:
        return x.new_empty(x.numel() + shift)[shift:].view(x.shape).copy_(x)

    cases = ((f"S {n}", on_device(n, d=64, dv=64, kv_heads=2, share=1)) for n in (65, 777))

    def laid(case: Case) -> Case:
        return replace(case, q=shifted(case.q), d_out=shifted(case.d_out))

    expect_none(faults(cases, dtype, laid=laid))


@in_half
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_expanded_tensors_are_right(dtype, dim: int) -> None:
    def expanded(case: Case) -> Case:
        one = {n: getattr(case, n).narrow(dim, 0, 1).expand_as(getattr(case, n)) for n in "kv"}
        return replace(case, **one, d_out=case.d_out.narrow(dim, 0, 1).expand_as(case.d_out))

    cases = ((f"S {n}", expanded(on_device(n, d=64, dv=64, kv_heads=2, share=1))) for n in (65, 777))
    expect_none(faults(cases, dtype, laid=expanded))  # rounding to `dtype` wrote them out: once more


@every_dtype
def test_time_before_heads_costs_no_copy(dtype) -> None:
    case = on_device(2000, d=64, dv=64, batch=2, kv_heads=8, share=1, decay="head").in_rounded(dtype)
    attend(case)
    peaks = []
    for layout in ("contiguous", "transposed"):
        laid = with_layout(layout)(case)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attend(laid)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] - peaks[0] < case.q.nbytes / 2
