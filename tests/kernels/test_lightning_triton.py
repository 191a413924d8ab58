"""Linear attention on Triton: interpreted where there is no GPU (fp32, fp16, small tiles), compiled where there is."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_cases import LAYOUTS, Case, Result, gradients, make_case, quadratic, recurrence
from oracle import assert_same
from torch import Tensor

from attnopt.kernels.lightning import chunked, triton_backward, triton_forward, triton_step
from attnopt.kernels.lightning.op import HALF, lightning_attention, lightning_step
from attnopt.kernels.lightning.triton_tiles import Tiles, choose_tiles, chunk_rows

HAS_GPU = torch.cuda.is_available()
GPU = [pytest.param("cuda", d, marks=pytest.mark.gpu) for d in (torch.float32, torch.bfloat16, torch.float16)]
#: Where kernels run, and in which dtypes; bf16 arithmetic is wrong in the interpreter.
PLACES = [*([] if HAS_GPU else [("cpu", torch.float32), ("cpu", torch.float16)]), *GPU]
PLACES_FP32 = [place for place in PLACES if (getattr(place, "values", place))[1] == torch.float32]
DECAYS = ("none", "head", "token")

everywhere = pytest.mark.parametrize(("device", "dtype"), PLACES)
on_gpu = pytest.mark.parametrize(("device", "dtype"), GPU)


def forward(case: Case, tiles: Tiles | None = None) -> Result:
    return triton_forward.forward(
        case.q, case.k, case.v, case.log_decay, case.initial_state, case.scale, tiles=tiles
    )  # fmt: skip


def backward(case: Case, tiles: Tiles | None = None) -> dict[str, Tensor]:
    """Gradients by name; those of a decay per head summed as the op does it."""
    g = triton_backward.backward(
        case.d_out, case.d_state, case.q, case.k, case.v, case.log_decay, case.initial_state, case.scale,
        with_log_decay=case.log_decay is not None, tiles=tiles,
    )  # fmt: skip
    found = {"q": g.q, "k": g.k, "v": g.v, "initial_state": g.initial_state}
    if case.log_decay is not None:
        found["log_decay"] = g.log_decay.sum((0, 2)) if case.log_decay.dim() == 1 else g.log_decay
    return {name: x for name, x in found.items() if getattr(case, name) is not None}


def assert_rows(
    got: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype, factor: float, what: str
) -> None:
    """The row rule in units of `dtype`, also where the result is fp32, as states are; scaled into its range."""
    unit = 2.0 ** math.ceil(math.log2(exact.abs().max().item() or 1.0))
    low, yardstick = ((x.double().cpu() / unit).to(dtype) for x in (got, eager))
    assert_same(low, exact.cpu() / unit, yardstick, factor=factor, what=what)


def assert_forward(case: Case, device: str, dtype: torch.dtype, tiles: Tiles | None = None) -> None:
    low = case.in_rounded(dtype)
    got, eager = forward(low.on(device), tiles), quadratic(low)
    for what, x, exact, y in zip(
        ("out", "state"), got, recurrence(low.map(Tensor.double)), eager, strict=True
    ):
        assert_rows(x, exact, y, dtype, 2.0, what)


def assert_backward(case: Case, device: str, dtype: torch.dtype, tiles: Tiles | None = None) -> None:
    low = case.in_rounded(dtype)
    got, eager = backward(low.on(device), tiles), gradients(quadratic, low)
    for name, exact in gradients(recurrence, low.map(Tensor.double)).items():
        if name == "log_decay" and dtype in HALF:
            continue  # the operator leaves it to the torch path in these types
        assert_rows(got[name], exact, eager[name], dtype, 3.0, f"d_{name}")


def small_case(length: int, **changes: object) -> Case:
    """One key/value head for two query heads; nothing cancels, so that the row rule is sharp."""
    return make_case(length, **{"batch": 1, "signed": False, **changes})


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


def token(case: Case, t: int) -> tuple[Tensor, Tensor, Tensor]:
    return case.q[:, :, t], case.k[:, :, t], case.v[:, :, t]


def steps(case: Case, state: Tensor) -> Tensor:
    out = []
    for t in range(case.q.shape[2]):
        per_token = case.log_decay is not None and case.log_decay.dim() == 3
        decay = case.log_decay[:, :, t] if per_token else case.log_decay
        out.append(triton_step.step(*token(case, t), state, decay, case.scale))
    return torch.stack(out, dim=2)


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


def test_many_heads_take_one_pass_and_few_fill_the_device() -> None:
    def segments(heads: int, length: int) -> int:
        return choose_tiles(heads, length, 128, 128, torch.bfloat16, 64, 132).segments

    assert segments(1024, 1024) == segments(256, 4096) == 1
    assert segments(16, 65536) * 16 >= 132
    assert segments(1, 64) == 1


# On a GPU only: the dispatch, real sizes, compilers.


@on_gpu
@pytest.mark.parametrize("d", [1, 3, 16, 40, 64, 80, 96, 128, 160, 256])
def test_every_width_runs_with_the_tiles_chosen_for_it(device, dtype, d: int) -> None:
    case = small_case(150, d=d, dv=max(1, d - 1))
    assert_forward(case, device, dtype)
    assert_backward(case, device, dtype)


@on_gpu
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize(("heads", "length"), [(300, 200), (2, 5000)])
def test_one_pass_and_many_segments_agree_with_torch(
    device, dtype, heads: int, length: int, decay: str
) -> None:
    torch.manual_seed(1)
    case = make_case(
        length, batch=1, kv_heads=heads, share=1, d=128, dv=128, decay=decay, rate=0.05, signed=False
    )
    low = case.in_rounded(dtype).on(device)
    wide = low.map(Tensor.double)
    got, grads = forward(low), backward(low)
    exact = chunked.forward(wide.q, wide.k, wide.v, wide.log_decay, wide.initial_state, wide.scale)
    want = gradients(attend, wide)  # fp64 takes the torch path
    assert_rows(got[0], exact[0], exact[0], dtype, 2.0, "out")
    assert_rows(got[1], exact[1], exact[1], dtype, 2.0, "state")
    for name in ("q", "k", "v", "initial_state"):
        assert_rows(grads[name], want[name], want[name], dtype, 3.0, f"d_{name}")


def attend(case: Case) -> Result:
    return lightning_attention(
        case.q, case.k, case.v,
        log_decay=case.log_decay, scale=case.scale, initial_state=case.initial_state, return_state=True,
    )  # fmt: skip


@on_gpu
def test_the_op_takes_the_kernels_on_a_gpu(device, dtype) -> None:
    case = small_case(100, decay="token").in_rounded(dtype).on(device)
    assert all(map(torch.equal, attend(case), forward(case)))
    if dtype == torch.float32:  # in half types a learned decay takes the torch path
        want = backward(case)
        assert all(
            torch.equal(got, want[name].to(got.dtype)) for name, got in gradients(attend, case).items()
        )
    one, state = replace(case, log_decay=None, scale=1.0).rows(0, 1), case.initial_state.clone()
    out = lightning_step(*token(one, 0), state)
    assert torch.equal(out[:, :, None], steps(one, case.initial_state))


@on_gpu
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_the_op_is_registered_well_on_a_gpu(device, dtype, layout: str) -> None:
    case = small_case(100, kv_heads=2).in_rounded(dtype).on(device)
    laid = case.map(lambda x: (LAYOUTS[layout](x) if x.dim() > 2 else x).requires_grad_())
    arguments = (laid.q, laid.k, laid.v, laid.log_decay, laid.initial_state, laid.scale, True)
    checks = torch.library.opcheck(torch.ops.attnopt.lightning_attention.default, arguments)
    assert set(checks.values()) == {"SUCCESS"}


@on_gpu
def test_compiled_is_eager_on_a_gpu(device, dtype) -> None:
    case = small_case(100).in_rounded(dtype).on(device)
    compiled = torch.compile(attend, fullgraph=True)
    assert all(map(torch.equal, compiled(case), attend(case)))
    want = gradients(attend, case)
    assert all(torch.equal(got, want[name]) for name, got in gradients(compiled, case).items())


@on_gpu
def test_a_captured_graph_replays_on_new_values(device, dtype) -> None:
    case = small_case(200).in_rounded(dtype).on(device)
    attend(case)  # compiles the kernels before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attend(case)
    case.q.mul_(0.5)
    graph.replay()
    assert torch.equal(out, attend(case)[0])


@on_gpu
def test_strides_beyond_32_bits_are_followed(device, dtype) -> None:
    wide = torch.empty(2100, 2**20, device=device, dtype=dtype)
    x = wide[:, 5:21].normal_()[None, None]
    assert x.stride(2) * x.shape[2] > 2**31
    assert torch.equal(lightning_attention(x, x, x), lightning_attention(*[x.contiguous()] * 3))


@on_gpu
@pytest.mark.parametrize(
    "tiles", [Tiles(64, 64, 1), Tiles(64, 128, 8, 8, 3), Tiles(32, 64, 4, 8), Tiles(16, 32, 2)]
)
def test_every_form_of_tiles_gives_the_same_bits_each_time(device, dtype, tiles: Tiles) -> None:
    case = (
        make_case(700, batch=1, kv_heads=8, share=1, d=128, dv=128, decay="token")
        .in_rounded(dtype)
        .on(device)
    )
    tiles = tiles if dtype == torch.bfloat16 else Tiles(16, 32, tiles.segments)
    first, first_grads = forward(case, tiles), backward(case, tiles)
    for _ in range(20):
        assert all(map(torch.equal, forward(case, tiles), first))
        assert all(torch.equal(got, first_grads[name]) for name, got in backward(case, tiles).items())
