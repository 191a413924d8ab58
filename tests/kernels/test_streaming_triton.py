"""The Triton path of streaming attention: interpreted without a GPU, compiled with one; the same laws on both."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from oracle import assert_same
from streaming_cases import (
    LAYOUTS,
    LOWEST,
    Call,
    Structure,
    call,
    calls,
    eager_gradients,
    eager_rows,
    laid_out,
    plain_gradients,
)
from torch import Tensor

from attnopt.kernels.streaming import chunked, triton_backward, triton_forward
from attnopt.kernels.streaming.op import attend
from attnopt.kernels.streaming.places import streaming_attention
from attnopt.kernels.streaming.problem import Answer, Gradients, Wanted
from attnopt.kernels.streaming.triton_tiles import BY_KEYS, BY_QUERIES, SMALLEST, Tiles, choose

# numpy, which interprets, reports the overflows that exponentials of masked logits rely on; a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

EXTRAS = ("none", "bias", "lowest", "mask", "padding", "sinks", "softcap", "alibi")
HALVES_ON_GPU = [(torch.bfloat16, extra) for extra in EXTRAS] + [
    (torch.float16, extra) for extra in EXTRAS[::3]
]
#: Where the kernels run, and in what. The interpreter's bf16 arithmetic is wrong, so bf16 needs a GPU; there the
#: other dtypes take fewer turns, as each is compiled.
PLACES = [
    pytest.param("cuda", dtype, extra, marks=pytest.mark.gpu)
    for dtype, extra in [*HALVES_ON_GPU, (torch.float32, "none"), (torch.float32, "bias")]
]
if not torch.cuda.is_available():
    PLACES += [("cpu", dtype, extra) for dtype in (torch.float16, torch.float32) for extra in EXTRAS]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_GPU = DEVICE == "cuda"

#: Small enough to interpret, and several tiles to every axis of the cases.
SMALL = Tiles(16, 16, 4, 1)
FLAT, TALL = Tiles(16, 32, 4, 2), Tiles(32, 16, 4, 2)
STREAM = Structure(offset=0, window=20, sinks=3)
STRUCTURES = [
    Structure(),
    Structure(offset=0),
    Structure(offset=-9),
    Structure(offset=14),  # one short of a tile: full and partial tiles meet at the last key that is seen
    Structure(offset=0, window=31),  # the same for the window
    Structure(offset=5, prefix=20),
    Structure(offset=0, window=1),
    Structure(offset=0, window=17, sinks=3),
    Structure(offset=3, window=33, sinks=20),
    Structure(offset=-7, window=5, sinks=4, prefix=2),
    Structure(offset=0, window=0, sinks=18),
    Structure(offset=0, window=-3),
    Structure(offset=10**9, window=10**9 + 2, sinks=10**9),
]
#: One head: what a law needs that is not about heads.
SINGLE = {"batch": 1, "kv_heads": 1}
LONG = [Structure(), Structure(offset=0), Structure(offset=0, window=200, sinks=4)]


def forward(c: Call, tiles: Tiles | None = SMALL) -> Answer:
    return triton_forward.launch(c.problem, tiles)


def backward(c: Call, do: Tensor, tiles: Tiles | None = SMALL, dlse: Tensor | None = None) -> Gradients:
    return triton_backward.launch(c.problem, forward(c, tiles), do, dlse, tiles, tiles)


def given_back(found: Gradients) -> list[Tensor]:
    return [x for x in (found.q, found.k, found.v, found.sink_logits) if x is not None]


def of_triton(c: Call, found: list[Tensor]) -> list[Tensor]:
    """Without the gradients that the torch path alone computes: those of the bias and of the slopes."""
    sinks = found[3 + (c.bias is not None) :][:1] if c.sink_logits is not None else []
    return [*found[:3], *sinks]


# ---- which keys are seen ----


@pytest.mark.parametrize("tiles", [SMALL, FLAT], ids=str)
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_tracer_shows_the_mask_bit_for_bit(structure: Structure, tiles: Tiles) -> None:
    for sq, sk in ((1, 1), (17, 33), (50, 40)):
        q, k = torch.zeros(1, 2, sq, 3), torch.randn(1, 1, sk, 3)
        keep = torch.arange(sk)[None] % 5 != 2
        c = Call(q, k, torch.eye(sk)[None, None], key_padding=keep, structure=structure, empty_row="zero")
        want = c.visible().expand(1, 2, sq, sk)
        o = forward(c.to(DEVICE), tiles).o.cpu()
        assert torch.equal(torch.round(o * want.sum(-1, keepdim=True)), want.float()), (sq, sk)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_tracer_backward_reaches_exactly_the_visible_pairs(structure: Structure) -> None:
    for sq, sk in ((17, 33), (40, 34)):
        q, k = torch.zeros(1, 1, sq, 3), torch.zeros(1, 1, sk, 3)
        c = Call(q, k, torch.randn(1, 1, sk, 4), structure=structure, empty_row="zero").to(DEVICE)
        do = torch.eye(sq, device=DEVICE)[None, None]
        wide = replace(c, v=torch.randn(1, 1, sk, sq, device=DEVICE))
        dv = backward(wide, do).v.cpu()[0, 0]
        seen = c.visible()[0, 0]
        assert torch.equal(torch.round(dv * seen.sum(-1)), seen.mT.float()), (sq, sk)


# ---- the numbers ----


@pytest.mark.parametrize(("device", "dtype", "extra"), PLACES)
def test_rows_and_gradients_are_as_good_as_eager(device: str, dtype: torch.dtype, extra: str) -> None:
    c = call(
        batch=1, kv_heads=1, sq=50, sk=50, d=24, dv=40, group=2, structure=STREAM, extras=frozenset({extra})
    )
    c = replace(c, empty_row="zero").to(dtype)
    do = torch.randn(1, 2, 50, 40).to(dtype)
    tiles = None if device == "cuda" else SMALL
    exact = c.to(torch.float64)
    assert_same(forward(c.to(device), tiles).o.cpu(), exact.plain(), c.plain())
    wanted = of_triton(c, plain_gradients(exact, do.double()))
    yardstick = of_triton(c, eager_gradients(c, do, plain_gradients(exact, do.double())))
    found = given_back(backward(c.to(device), do.to(device), tiles))
    for got, want, eager in zip(found, wanted, yardstick, strict=True):
        assert_same(got.cpu(), want, eager, factor=3.0, what="gradient")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("d", "dtype"),
    [
        (16, torch.float16),
        (64, torch.bfloat16),
        (80, torch.bfloat16),
        (128, torch.bfloat16),
        (256, torch.float16),
    ],
)
@pytest.mark.parametrize(
    "structure", [Structure(), Structure(offset=0), Structure(offset=0, window=200, sinks=4)], ids=str
)
def test_long_rows_and_gradients_are_as_good_as_eager(
    structure: Structure, d: int, dtype: torch.dtype
) -> None:
    c = call(
        batch=1, kv_heads=2, group=2, sq=1100, sk=1100, d=d, dv=d, scale=d**-0.5, structure=structure
    ).to(dtype)
    do = torch.randn(1, 4, 1100, d).to(dtype)
    exact = c.to(torch.float64)
    assert_same(forward(c.to("cuda"), None).o.cpu(), exact.plain(), c.plain())
    wanted = plain_gradients(exact, do.double())
    for got, want, eager in zip(
        given_back(backward(c.to("cuda"), do.cuda(), None)),
        wanted,
        eager_gradients(c, do, wanted),
        strict=True,
    ):
        assert_same(got.cpu(), want, eager, factor=3.0, what="gradient")


@settings(max_examples=25 if ON_GPU else 12)
@given(calls(longest=300 if ON_GPU else 24))
def test_it_agrees_with_the_torch_path(c: Call) -> None:
    c = c.to(DEVICE)
    problem = c.problem
    if min(x.numel() for x in (c.q, c.k, c.v)) == 0:
        return
    want, got = chunked.forward(problem), forward(c)
    for x, y in ((got.o, want.o), (got.lse, want.lse), (got.log_sum, want.log_sum)):
        assert torch.allclose(x, y, rtol=1e-4, atol=1e-4, equal_nan=True)
    do, dlse = torch.randn_like(want.o), torch.randn_like(want.lse)
    wanted = given_back(chunked.backward(problem, want, do, dlse, Wanted()))
    for x, y in zip(given_back(backward(c, do, dlse=dlse)), wanted, strict=True):
        assert torch.allclose(
            x, y, rtol=1e-3, atol=1e-3 * max(1.0, float(y.nan_to_num().abs().max())), equal_nan=True
        )


@pytest.mark.parametrize("tiles", [FLAT, TALL], ids=str)
def test_any_tiles_give_the_same(tiles: Tiles) -> None:
    c = call(batch=1, sq=70, sk=70, group=2, structure=Structure(offset=0, window=19, sinks=3, prefix=2)).to(
        DEVICE
    )
    do = torch.randn_like(c.q)
    assert torch.allclose(forward(c, tiles).o, forward(c).o, atol=1e-5)
    for x, y in zip(given_back(backward(c, do, tiles)), given_back(backward(c, do)), strict=True):
        assert torch.allclose(x, y, atol=1e-4)


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_gradients_agree_with_the_torch_path_in_every_structure(structure: Structure) -> None:
    c = call(sq=50, sk=40, structure=structure, empty_row="zero", **SINGLE).to(DEVICE)
    do = torch.randn_like(c.q)
    want = chunked.backward(c.problem, chunked.forward(c.problem), do, None, Wanted())
    for x, y in zip(given_back(backward(c, do)), given_back(want), strict=True):
        assert torch.allclose(x, y, atol=1e-5)


def test_far_sinks_are_summed_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    c = call(
        batch=1, kv_heads=1, group=2, sq=90, sk=90, structure=Structure(offset=0, window=8, sinks=20)
    ).to(DEVICE)
    do = torch.randn_like(c.q)
    whole = given_back(backward(c, do))
    monkeypatch.setattr(triton_backward, "FAR_ROWS", 20)
    for x, y in zip(given_back(backward(c, do)), whole, strict=True):
        assert torch.allclose(x, y, atol=1e-5)
    want = plain_gradients(c.to("cpu").to(torch.float64), do.double().cpu())
    assert torch.allclose(whole[1].cpu().double(), want[1], atol=1e-5)


# ---- rows that see no key ----


@pytest.mark.parametrize("meaning", ["nan", "zero", "uniform"])
def test_empty_rows_return_what_they_mean(meaning: str) -> None:
    c = call(sq=20, sk=20, group=2, structure=Structure(offset=-6), empty_row=meaning).to(DEVICE)
    o = forward(c).o.cpu()[:, :, :6]
    mean = c.v.mean(2).repeat_interleave(2, dim=1)[:, :, None].expand(2, 4, 6, 16).cpu()
    want = {"nan": torch.full_like(mean, torch.nan), "zero": torch.zeros_like(mean), "uniform": mean}[meaning]
    assert torch.allclose(o, want, atol=1e-6, equal_nan=True)


def test_what_arrives_at_empty_rows_spoils_no_gradient() -> None:
    c = call(sq=20, sk=20, structure=Structure(offset=-6)).to(DEVICE)
    do = torch.randn_like(c.q)
    spoilt = torch.where(torch.arange(20, device=DEVICE)[:, None] < 6, torch.nan, do)
    for got, want in zip(given_back(backward(c, spoilt)), given_back(backward(c, do)), strict=True):
        assert torch.equal(got, want)


def test_a_row_of_the_lowest_number_is_not_empty_but_uniform() -> None:
    c = replace(call(sq=5, sk=7), bias=torch.full((1, 1, 5, 7), LOWEST)).to(DEVICE)
    do = torch.randn_like(c.q)
    assert torch.allclose(forward(c).o, c.v.mean(2, keepdim=True).expand(2, 2, 5, 16), atol=1e-6)
    dv = backward(c, do).v
    assert torch.allclose(dv, do.mean(2, keepdim=True).expand(2, 2, 7, 16) * 5 / 7, atol=1e-6)


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf])
def test_rubbish_in_padded_keys_and_values_stays_there(rubbish: float) -> None:
    extras = frozenset({"padding"})
    c = call(sq=30, sk=30, structure=STREAM, extras=extras, empty_row="zero", **SINGLE).to(DEVICE)
    gone = ~c.key_padding[:, None, :, None]
    dirty = replace(c, k=c.k.masked_fill(gone, rubbish), v=c.v.masked_fill(gone, rubbish))
    do = torch.randn_like(c.q)
    assert torch.equal(forward(dirty).o, forward(c).o)
    for got, want in zip(given_back(backward(dirty, do)), given_back(backward(c, do)), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("meaning", ["nan", "zero"])
def test_a_visible_nan_is_seen(meaning: str) -> None:
    c = call(sq=40, sk=40, structure=Structure(offset=0), empty_row=meaning, **SINGLE).to(DEVICE)
    c.k[:, :, 21] = torch.nan
    assert torch.isnan(forward(c).o[:, :, 21:]).all()
    assert not torch.isnan(forward(c).o[:, :, :21]).any()


# ---- laws ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str) -> None:
    c = call(sq=27, sk=27, group=2, structure=STREAM, extras=frozenset({"bias"}), empty_row="zero", **SINGLE)
    names = ("q", "k", "v", "bias")
    odd = replace(c, **{name: laid_out(getattr(c, name), layout) for name in names}).to(DEVICE)
    packed = replace(odd, **{name: getattr(odd, name).contiguous() for name in names})
    do = torch.randn(1, 1, 1, 16, device=DEVICE).expand(1, 2, 27, 16)
    assert torch.equal(forward(odd).o, forward(packed).o)
    for got, want in zip(
        given_back(backward(odd, do)), given_back(backward(packed, do.contiguous())), strict=True
    ):
        assert torch.equal(got, want)


def test_edits_of_the_future_do_not_change_the_past() -> None:
    c = call(sq=50, sk=50, structure=STREAM, **SINGLE).to(DEVICE)
    edited = replace(c, k=c.k.clone(), v=c.v.clone())
    edited.k[:, :, 31:] = 9.0
    edited.v[:, :, 31:] = -7.0
    assert torch.equal(forward(edited).o[:, :, :31], forward(c).o[:, :, :31])


def test_it_gives_the_same_bits_each_time_and_writes_to_no_input() -> None:
    c = call(sq=60, sk=60, structure=STREAM, extras=frozenset({"bias", "mask", "padding", "sinks"})).to(
        DEVICE
    )
    before = [x.clone() for x in c.arguments[:7]]
    do = torch.randn_like(c.q)
    first = [forward(c).o, *given_back(backward(c, do))]
    for _ in range(100 if ON_GPU else 1):
        again = [forward(c).o, *given_back(backward(c, do))]
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(before, c.arguments[:7], strict=True))


@pytest.mark.parametrize("scale", [0.0, -1.0, 8.0])
def test_any_scale_is_served(scale: float) -> None:
    c = call(sq=40, sk=40, d=24, structure=STREAM, scale=scale, **SINGLE)
    exact = c.to(torch.float64).plain()
    assert_same(forward(c.to(DEVICE)).o.cpu(), exact, eager_rows(c, exact))


# ---- around the kernels ----


@pytest.mark.parametrize("shared", [48 * 1024, 99 * 1024, 163 * 1024, 227 * 1024])
@pytest.mark.parametrize("candidates", [BY_QUERIES, BY_KEYS])
def test_chosen_tiles_fit(candidates: tuple[Tiles, ...], shared: int) -> None:
    for width in (16, 32, 64, 128, 256):
        for itemsize in (2, 4):
            tiles = choose(candidates, width, itemsize, 5, shared)
            smallest = replace(SMALLEST, warps=tiles.warps)
            assert tiles == smallest or tiles.shared_bytes(width, itemsize, 5) <= shared
    assert choose(candidates, 128, 2, 0, 227 * 1024).warps == 8


def test_importing_attnopt_does_not_import_triton() -> None:
    code = "import sys, attnopt.kernels.streaming.op; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_op_serves_the_gpu(dtype: torch.dtype) -> None:
    c = call(sq=300, sk=300, d=64, dv=64, group=2, structure=Structure(offset=0, window=100, sinks=4)).to(
        dtype
    )
    leaves = [x.to("cuda").requires_grad_() for x in (c.q, c.k, c.v)]
    o = streaming_attention(*leaves, window=100, scale=c.scale)
    exact = c.to(torch.float64)
    assert_same(o.cpu(), exact.plain(), c.plain())
    do = torch.randn(2, 4, 300, 64).to(dtype)
    wanted = plain_gradients(exact, do.double())
    found = torch.autograd.grad(o, leaves, do.cuda())
    for got, want, eager in zip(found, wanted, eager_gradients(c, do, wanted), strict=True):
        assert_same(got.cpu(), want, eager, factor=3.0, what="gradient")


@pytest.mark.gpu
def test_the_op_is_captured_in_a_graph_and_replayed_with_new_values() -> None:
    c = call(sq=200, sk=200, d=64, structure=STREAM).to(torch.bfloat16).to("cuda")
    attend(*c.arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = attend(*c.arguments)[0]
    c.q.copy_(torch.randn_like(c.q))
    graph.replay()
    assert torch.equal(o, attend(*c.arguments)[0])


@pytest.mark.gpu
def test_strides_beyond_two_to_the_31_are_followed() -> None:
    heads = torch.empty(3, 2**30 + 64, dtype=torch.bfloat16, device="cuda")
    views = [heads[:, n * 2048 : (n + 1) * 2048].view(1, 3, 32, 64) for n in range(3)]
    for view in views:
        view.copy_(torch.randn(view.shape))
    c = Call(*views, structure=Structure(offset=0))
    packed = replace(c, **{name: getattr(c, name).contiguous() for name in "qkv"})
    assert torch.equal(forward(c, None).o, forward(packed, None).o)
