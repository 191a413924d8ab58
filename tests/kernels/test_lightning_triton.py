"""Linear attention on Triton: interpreted where there is no GPU (fp32, fp16, small tiles), compiled where there is."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_cases import LAYOUTS, gradients, make_case, quadratic, recurrence
from lightning_judging import (
    assert_backward,
    assert_forward,
    assert_rows,
    backward,
    forward,
    small_case,
    steps,
)
from oracle import assert_same
from torch import Tensor

from attnopt.kernels.lightning import triton_backward, triton_forward
from attnopt.kernels.lightning.triton_launch import _is_bulk
from attnopt.kernels.lightning.triton_tiles import Tiles, _programs, choose_tiles, chunk_rows

HAS_GPU = torch.cuda.is_available()
GPU = [pytest.param("cuda", d, marks=pytest.mark.gpu) for d in (torch.float32, torch.bfloat16, torch.float16)]
#: Where kernels run, and in which dtypes; bf16 arithmetic is wrong in the interpreter.
PLACES = [*([] if HAS_GPU else [("cpu", torch.float32), ("cpu", torch.float16)]), *GPU]
PLACES_FP32 = [place for place in PLACES if (getattr(place, "values", place))[1] == torch.float32]
PLACES_HALF = [place for place in PLACES if place not in PLACES_FP32]
DECAYS = ("none", "head", "token")

everywhere = pytest.mark.parametrize(("device", "dtype"), PLACES)


# Against the recurrence.


@everywhere
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("length", "segments"), [(1, 1), (16, 1), (33, 1), (33, 2), (50, 4)])
def test_forward_is_the_recurrence(device, dtype, length: int, segments: int, decay: str) -> None:
    assert_forward(small_case(length, decay=decay), device, dtype, Tiles(16, 16, segments))


@everywhere
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("length", "segments"), [(17, 1), (40, 3)])
def test_backward_is_that_of_the_recurrence(device, dtype, length: int, segments: int, decay: str) -> None:
    assert_backward(small_case(length, decay=decay), device, dtype, Tiles(16, 16, segments))


@everywhere
@pytest.mark.parametrize(("d", "dv"), [(1, 1), (3, 40), (40, 3)])
def test_any_width_is_served(device, dtype, d: int, dv: int) -> None:
    case = small_case(20, d=d, dv=dv)
    assert_forward(case, device, dtype, Tiles(16, 16, 2))
    assert_backward(case, device, dtype, Tiles(16, 16, 2))


@everywhere
@pytest.mark.parametrize("rate", [0.0, 1.0, 20.0])
def test_any_strength_of_decay_is_served(device, dtype, rate: float) -> None:
    for decay in ("head", "token"):
        case = small_case(24, decay=decay, rate=rate, kv_heads=2, share=1)
        assert_forward(case, device, dtype, Tiles(16, 16, 1))
        assert_backward(case, device, dtype, Tiles(16, 16, 1))


@everywhere
def test_a_call_without_states_starts_from_zero(device, dtype) -> None:
    case = replace(small_case(20, with_state=False), d_state=torch.zeros(1, 2, 8, 8, dtype=torch.float64))
    assert_forward(case, device, dtype)
    low = case.in_rounded(dtype).on(device)
    tensors = (low.d_out, None, low.q, low.k, low.v, low.log_decay, None, low.scale)
    without, zeros = triton_backward.backward(*tensors, with_log_decay=True), backward(low)
    assert all(torch.equal(getattr(without, name), zeros[name]) for name in "qkv")
    assert without.initial_state.numel() == 0


@everywhere
@pytest.mark.parametrize("segments", [1, 2])
def test_a_state_that_nobody_asks_for_is_not_written(device, dtype, segments: int) -> None:
    low, tiles = small_case(40).in_rounded(dtype).on(device), Tiles(16, 16, segments)
    given = (low.q, low.k, low.v, low.log_decay, low.initial_state, low.scale)
    out, state = triton_forward.forward(*given, with_state=False, tiles=tiles)
    assert torch.equal(out, forward(low, tiles)[0])
    assert state.numel() == 0


@everywhere
@pytest.mark.parametrize("rate", [-math.inf, -1e30, -104.0])
def test_a_decay_that_forgets_everything_leaves_each_token_alone(device, dtype, rate: float) -> None:
    for decay in ("head", "token"):
        case = small_case(20, decay=decay)
        gone = replace(case, log_decay=torch.full_like(case.log_decay, rate)).in_rounded(dtype).on(device)
        alone = (case.q * case.k).sum(-1, keepdim=True) * case.v * case.scale
        torch.testing.assert_close(forward(gone)[0].cpu(), alone.to(dtype), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("device", "dtype"), PLACES_FP32)
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_small_integers_are_exact_in_fp32(device, dtype, factor: float) -> None:
    case = make_case(12 if factor == 0.5 else 40, batch=1, d=4, dv=3, scale=1.0)
    case = case.map(lambda x: x.mul(2).round().clamp(-3, 3))
    case = replace(case, log_decay=torch.full_like(case.log_decay, math.log(factor)))
    low, want, tiles = case.in_rounded(dtype).on(device), gradients(recurrence, case), Tiles(16, 16, 2)
    for got, exact in zip(forward(low, tiles), recurrence(case), strict=True):
        assert torch.equal(got.cpu().double(), exact)
    for name, got in backward(low, tiles).items():
        assert name == "log_decay" or torch.equal(got.cpu().double(), want[name]), name


# How the sequence is cut.


@everywhere
@pytest.mark.parametrize(("segments", "pieces"), [(2, 1), (3, 2), (9, 2)])
def test_segments_and_their_pieces_add_up(device, dtype, segments: int, pieces: int) -> None:
    tiles = Tiles(16, 16, segments, pieces=pieces)
    case = small_case(100, decay="token", share=1)
    assert_forward(case, device, dtype, tiles)
    assert_backward(case, device, dtype, tiles)


@everywhere
@pytest.mark.parametrize("rate", [3.0, 20.0, 1e30])
def test_rows_that_fade_inside_a_segment_are_not_missed(device, dtype, rate: float) -> None:
    """Segments of 64 rows, of which the first pass reads the last ones only."""
    case = small_case(100, kv_heads=2, share=1)
    case = replace(case, log_decay=torch.tensor([-rate, -1e-3], dtype=torch.float64).float().double())
    assert_forward(case, device, dtype, Tiles(16, 16, 2))
    assert_backward(case, device, dtype, Tiles(16, 16, 2))


@pytest.mark.parametrize(("device", "dtype"), PLACES_FP32)
@pytest.mark.parametrize("rate", [1.0, 4.0, 8.0])
def test_the_loudest_row_fades_where_it_is_not_read(device, dtype, rate: float) -> None:
    case = small_case(130, share=1, with_state=False)
    case = replace(case, log_decay=torch.full_like(case.log_decay, -rate))
    case.k[:, :, 1::17] *= 2.0**60
    case.v[:, :, 1::17] *= 2.0**60
    low = case.in_rounded(dtype)
    got, exact = forward(low.on(device), Tiles(16, 16, 2)), recurrence(low.map(Tensor.double))
    for x, y in zip(got, exact, strict=True):  # exponents of 100 are as exact as fp32 holds them
        torch.testing.assert_close(x.cpu().double(), y, rtol=1e-4, atol=0)


@everywhere
@pytest.mark.parametrize("scale", [0.0, -0.5])
@pytest.mark.parametrize("segments", [1, 3])
def test_any_scale_is_served_in_both_directions(device, dtype, scale: float, segments: int) -> None:
    case = small_case(40, share=1, scale=scale)
    assert_forward(case, device, dtype, Tiles(16, 16, segments))
    assert_backward(case, device, dtype, Tiles(16, 16, segments))


@pytest.mark.parametrize(("device", "dtype"), PLACES_HALF)
@pytest.mark.parametrize(
    ("layout", "bulk"),
    [("contiguous", True), ("transposed", True), ("columns first", False), ("padded", False)],
)
def test_both_ways_of_loading_are_the_recurrence(device, dtype, layout: str, bulk: bool) -> None:
    """Tensor descriptors where rows start at multiples of 16 bytes, else pointers."""
    case = small_case(37, kv_heads=2, share=2, d=16, dv=24)
    low = case.in_rounded(dtype)
    laid = low.on(device).map(lambda x: LAYOUTS[layout](x) if x.dim() > 2 else x)
    assert all(_is_bulk(x) is bulk for x in (laid.q, laid.k, laid.v, laid.d_out))
    tiles, wide = Tiles(16, 16, 2), low.map(Tensor.double)
    got, grads = forward(laid, tiles), backward(laid, tiles)
    for what, *x in zip(("out", "state"), got, recurrence(wide), quadratic(low), strict=True):
        assert_rows(*x, dtype, 2.0, what)
    eager = gradients(quadratic, low)
    for name, exact in gradients(recurrence, wide).items():
        assert_rows(grads[name], exact, eager[name], dtype, 3.0, f"d_{name}")


# Laws.


@everywhere
def test_the_future_does_not_touch_the_past(device, dtype) -> None:
    case = make_case(40, batch=1, decay="token").in_rounded(dtype).on(device)
    edited = case.map(Tensor.clone)
    for x in (edited.q, edited.k, edited.v, edited.log_decay):
        x[:, :, 21:] -= 1.0
    past = [forward(c, Tiles(16, 16, 2))[0][:, :, :21] for c in (case, edited)]
    assert torch.equal(*past)


@everywhere
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_later_keys_that_are_not_finite_do_not_touch_the_past(device, dtype, decay: str) -> None:
    case = make_case(40, batch=1, decay=decay).in_rounded(dtype).on(device)
    edited = case.map(Tensor.clone)
    edited.k[:, :, 21:], edited.k[:, :, 30:] = torch.inf, torch.nan
    past = [forward(c, Tiles(16, 16, 2))[0][:, :, :21] for c in (case, edited)]
    assert torch.equal(*past)


@everywhere
@pytest.mark.parametrize("layout", ["transposed", "columns first", "sliced"])
def test_the_layout_in_memory_changes_nothing(device, dtype, layout: str) -> None:
    case = make_case(20, batch=1, kv_heads=2, share=1, dv=5).in_rounded(dtype).on(device)
    laid = case.map(lambda x: LAYOUTS[layout](x) if x.dim() > 2 else x)
    tiles = Tiles(16, 16, 2)
    for got, want in zip(forward(laid, tiles), forward(case, tiles), strict=True):
        assert_unchanged(got, want)
    plain = backward(case, tiles)
    for name, got in backward(laid, tiles).items():
        assert_unchanged(got, plain[name])


def assert_unchanged(got: Tensor, want: Tensor) -> None:
    """The same bits in the interpreter; a compiled kernel is specialised by strides and may sum in another order."""
    if got.is_cuda:
        assert_same(got, want.double())
    else:
        assert torch.equal(got, want)


@everywhere
def test_expanded_tensors_are_read_as_they_are(device, dtype) -> None:
    case = make_case(20, batch=2, kv_heads=2).in_rounded(dtype).on(device)
    one = replace(case, k=case.k[:1, :1].expand_as(case.k), v=case.v[:, :, :1].expand_as(case.v))
    plain = one.map(lambda x: x.contiguous())
    assert all(map(torch.equal, forward(one), forward(plain)))


@everywhere
def test_results_are_the_same_bits_each_time_and_inputs_stay(device, dtype) -> None:
    case = make_case(40, batch=1, decay="token").in_rounded(dtype).on(device)
    before, tiles = case.map(Tensor.clone), Tiles(16, 16, 2)
    first, first_grads = forward(case, tiles), backward(case, tiles)
    assert all(map(torch.equal, forward(case, tiles), first))
    assert all(torch.equal(got, first_grads[name]) for name, got in backward(case, tiles).items())
    assert all(
        torch.equal(getattr(case, n), getattr(before, n)) for n in ("q", "k", "v", "log_decay", "d_out")
    )


# One token at a time.


@everywhere
@pytest.mark.parametrize("decay", DECAYS)
def test_prefill_then_steps_are_one_pass(device, dtype, decay: str) -> None:
    low = small_case(30, decay=decay, d=9, dv=17).in_rounded(dtype)
    case = low.on(device)
    out, state = forward(case.rows(0, 27), Tiles(16, 16, 2))
    out = torch.cat([out, steps(case.rows(27, None), state)], dim=2)
    exact, eager = recurrence(low.map(Tensor.double)), quadratic(low)
    assert_rows(out, exact[0], eager[0], dtype, 2.0, "out")
    assert_rows(state, exact[1], eager[1], dtype, 2.0, "state")


@everywhere
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_state_of_any_layout_is_updated_in_place(device, dtype, layout: str) -> None:
    case = make_case(2, batch=2, kv_heads=2).in_rounded(dtype).on(device)
    plain, laid = case.initial_state.clone(), LAYOUTS[layout](case.initial_state.clone())
    assert_unchanged(steps(case, laid), steps(case, plain))
    assert_unchanged(laid, plain)


# Tiles.


@given(
    st.integers(1, 4096), st.integers(1, 2**21), st.integers(1, 256), st.integers(1, 256),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_tiles_are_legal_for_every_shape(
    heads: int, length: int, dx: int, dz: int, dtype: torch.dtype
) -> None:
    chunk = chunk_rows(length, max(dx, dz), dtype)
    tiles = choose_tiles(heads, length, dx, dz, dtype, chunk, 132)
    assert tiles.chunk == chunk
    assert tiles.chunk in {16, 32, 64}
    assert tiles.columns in {16, 32, 64, 128}
    assert 1 <= tiles.segments <= max(1, length // (2 * chunk))


def test_segments_are_cut_only_where_one_pass_leaves_the_device_idle() -> None:
    def chosen(heads: int, length: int) -> Tiles:
        return choose_tiles(heads, length, 128, 128, torch.bfloat16, 64, 132)

    def programs(heads: int, length: int) -> int:
        tiles = chosen(heads, length)
        return heads * tiles.segments * math.ceil(128 / tiles.columns)

    assert chosen(1024, 1024).segments == 1  # many heads: a second reading of keys and values buys nothing
    assert chosen(1, 64).segments == 1  # too short to be cut
    assert chosen(16, 65536).segments > 1
    assert all(programs(heads, 65536) >= 0.9 * 132 for heads in (1, 2, 3, 4, 8, 16, 32, 64))


@given(
    st.integers(1, 5000), st.integers(1, 2**20), st.sampled_from([16, 32, 64, 128, 256]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_the_choice_is_among_the_shipped_programs(
    heads: int, length: int, width: int, dtype: torch.dtype
) -> None:
    """Those that test_lightning_gpu_bits.py runs a hundred times."""
    chunk = chunk_rows(length, width, dtype)
    chosen = choose_tiles(heads, length, width, width, dtype, chunk, 132)
    assert replace(chosen, segments=1, pieces=1) in _programs(width, width, dtype, chunk)
