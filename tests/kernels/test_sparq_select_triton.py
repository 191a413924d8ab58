"""Choosing positions without sorting, and the whole step, in Triton: interpreted without a GPU, compiled with one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same
from sparq_cases import Case, request_of
from sparq_judging import SMALL
from torch import Tensor

from attnopt.kernels.sparq import steps
from attnopt.kernels.sparq.append import Buffers, append
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.triton_decode import decode
from attnopt.kernels.sparq.triton_select import Weights, choose_positions, sort_positions
from attnopt.kernels.sparq.triton_start import Token

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAST, MOST = -(2**31), 2**31 - 1
#: No second list of positions, one that is often too short, and one that holds all.
NARROW = (16, 256)


def request_for(weight: Tensor, topk: int, local: int) -> Request:
    groups, sk = weight.shape
    x = torch.zeros(groups, 1, sk, 1, device=DEVICE)
    return Request(x[:, :, :1], x, x, None, None, None, 1, topk, local, 1.0, True)


def ranks(weight: Tensor, local: int) -> Tensor:
    """The order of the definition: integers that grow with the weight, the last `local` on top, -inf at the bottom."""
    bits = weight.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf).add(0.0).view(torch.int32)
    rank = torch.where(bits < 0, bits ^ MOST, bits).long()
    rank[:, weight.shape[1] - local :] = MOST
    return rank.masked_fill(weight == -torch.inf, LEAST)


def weights_for(weight: Tensor, local: int, run: int) -> Weights:
    rank = ranks(weight, local)
    padded = torch.nn.functional.pad(rank, (0, -rank.shape[1] % run), value=LEAST)
    best = padded.view(len(weight), -1, run).amax(-1).int()
    return Weights(weight.to(DEVICE), best.to(DEVICE), None)


def expected(weight: Tensor, topk: int, local: int) -> list[list[int]]:
    rows = []
    for rank in ranks(weight, local).tolist():
        there = [i for i in range(len(rank)) if rank[i] != LEAST]
        best = sorted(sorted(there, key=lambda i: (-rank[i], i))[:topk])
        rows.append(best + [-1] * (topk - len(best)))
    return rows


def assert_selected(weight: Tensor, topk: int, local: int, run: int, narrow: int) -> None:
    request, weights = request_for(weight, topk, local), weights_for(weight, local, run)
    chosen = choose_positions(request, weights, replace(SMALL, run=run, narrow=narrow))
    assert chosen.positions.tolist() == expected(weight, topk, local)
    there = (weight != -torch.inf).sum(-1)
    assert (chosen.there.cpu() > topk).tolist() == (there > topk).tolist()
    few = there <= topk
    assert torch.equal(chosen.there.cpu().long()[few], there[few])


VALUES = st.sampled_from(
    [0.0, -0.0, 1.0, 1.0000001, -3.0, 2.5e-38, 1e30, -1e-30, torch.inf, -torch.inf, torch.nan]
)


@settings(max_examples=30)
@given(st.lists(VALUES | st.floats(width=32), min_size=1, max_size=90), st.data())
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes in numpy, which warns of NaN
def test_any_weights_are_chosen_as_a_stable_sort_would(values: list[float], data: st.DataObject) -> None:
    topk = data.draw(st.integers(1, len(values)))
    local = data.draw(st.integers(0, topk))
    run, narrow = data.draw(st.sampled_from([16, 32])), data.draw(st.sampled_from(NARROW))
    assert_selected(torch.tensor([values, values[::-1]]), topk, local, run, narrow)


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("topk", [1, 7, 100])
def test_equal_weights_are_chosen_in_order(topk: int, narrow: int) -> None:
    for value in (0.0, -5.0, 1.0):
        assert_selected(torch.full((2, 300), value), topk, min(topk, 3), 16, narrow)


@pytest.mark.parametrize("narrow", NARROW)
def test_a_cluster_in_one_run_is_chosen_whole(narrow: int) -> None:
    weight = torch.rand(1, 400)
    weight[0, 37:61] += 5
    assert_selected(weight, 24, 0, 16, narrow)
    assert expected(weight, 24, 0) == [list(range(37, 61))]


@settings(max_examples=15)
@given(st.integers(1, 60), st.floats(0, 1), st.data())
def test_sorting_chooses_the_same(sk: int, absent: float, data: st.DataObject) -> None:
    topk = data.draw(st.integers(1, sk))
    local = data.draw(st.integers(0, topk))
    weight = torch.randint(0, 6, (3, sk)).float().masked_fill(torch.rand(3, sk) < absent, -torch.inf)
    chosen = sort_positions(request_for(weight, topk, local), weights_for(weight, local, 16))
    wanted = torch.tensor(expected(weight, topk, local))
    assert torch.equal(chosen.positions.cpu().sort().values, wanted.sort().values)
    assert torch.equal(chosen.there.cpu(), (weight != -torch.inf).sum(-1))


def test_sorting_and_choosing_give_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.kernels.sparq import triton_decode

    request = ranged(Case(sk=70, group=2, padding=0.2))
    usual = decode(request, SMALL)
    monkeypatch.setattr(triton_decode, "is_selectable", lambda request, tiles: False)
    assert_same(decode(request, SMALL), usual.double())


# A part of the buffers.

RANGES = [(0, 20), (13, 33), (16, 32), (49, 50), (7, 7)]
CASES = [
    Case(),
    Case(group=3, mean_value=True),
    Case(has_k_t=False),
    Case(topk=50, group=2),
    Case(padding=0.3),
]


def ranged(case: Case, first: int = 3, last: int = 41) -> Request:
    """Row 0 counts from first to last, row 1 all of it; a mean is given, and what lies outside holds NaN."""
    r = request_of(case, device=DEVICE)
    k, v = r.k.clone(), r.v.clone()
    outside = torch.ones(r.k.shape[2], dtype=torch.bool, device=DEVICE)
    outside[first:last] = False
    k[0, :, outside], v[0, :, outside] = torch.nan, torch.inf
    starts = torch.tensor([first, 0], device=DEVICE)
    lengths = torch.tensor([last, r.k.shape[2]], device=DEVICE)
    k_t = None if r.k_t is None else k.mT.contiguous()
    request = replace(r, k=k, v=v, k_t=k_t, starts=starts, lengths=lengths)
    return replace(request, v_mean=steps.mean_of_values(request.masked()))


@pytest.mark.parametrize("ends", RANGES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_range_is_the_same_as_its_mask(case: Case, ends: tuple[int, int]) -> None:
    request = ranged(case, *ends)
    assert_same(decode(request, SMALL), steps.decode(request.masked()).double())


def test_a_missing_mean_is_that_of_the_range() -> None:
    request = ranged(Case())
    assert torch.equal(decode(replace(request, v_mean=None), SMALL), decode(request.masked(), SMALL))


@pytest.mark.parametrize("lengths", [(0, 49), (30, 12), (5, 50)], ids=str)
@pytest.mark.parametrize(
    "case", [Case(), Case(group=2), Case(group=2, topk=60), Case(has_k_t=False)], ids=str
)
def test_a_step_is_append_then_attention(case: Case, lengths: tuple[int, int]) -> None:
    r = request_of(case, device=DEVICE)
    token = Token(*torch.randn(2, 2, 2, 1, 16, device=DEVICE))
    starts, now = torch.tensor([0, 4], device=DEVICE), torch.tensor(lengths, device=DEVICE, dtype=torch.int32)
    request = replace(r, v_mean=torch.randn(2, 2, 16, device=DEVICE), starts=starts, lengths=now, grown=1)
    names = [name for name in ("k", "v", "k_t", "v_mean") if getattr(request, name) is not None]
    there = replace(request, **{name: getattr(request, name).clone() for name in names})
    fits = torch.arange(2, device=DEVICE)[now < 50]
    append(rows_of(there, fits), token.k[fits], token.v[fits])
    out = decode(request, SMALL, token)
    for name in names:
        torch.testing.assert_close(getattr(request, name), getattr(there, name), rtol=1e-6, atol=1e-6)
    assert_same(out[fits], steps.decode(there.masked())[fits].double())
    assert now.tolist() == list(lengths)


def rows_of(request: Request, rows: Tensor) -> Buffers:
    """The buffers of consecutive batch rows from the first one, as views."""
    mine = slice(0, len(rows))
    parts = (request.k, request.v, request.k_t, request.v_mean, request.starts, request.lengths)
    return Buffers(*(None if x is None else x[mine] for x in parts))


def test_a_step_gives_the_same_bits_each_time() -> None:
    outs = []
    for _ in range(2):
        request = replace(ranged(Case(group=2), 0, 30), grown=1)
        outs.append(decode(request, SMALL, Token(request.k[:, :, :1].clone(), request.v[:, :, :1].clone())))
    assert torch.equal(*outs)


# On a GPU only.


@pytest.mark.gpu
@pytest.mark.parametrize("sk", [5_000, 131_072, 1_000_000])
@pytest.mark.parametrize("topk", [1, 128, 1000])
def test_long_rows_are_chosen_as_a_stable_sort_would(sk: int, topk: int) -> None:
    from attnopt.kernels.sparq.tiles import candidates

    weight = torch.randn(3, sk).round(decimals=2)
    run = min((16, 32, 64, 128), key=lambda run: candidates(sk, topk, run))
    if candidates(sk, topk, run) <= 32768:
        order = ranks(weight, 1).sort(dim=-1, descending=True, stable=True).indices[:, :topk].sort().values
        for narrow in NARROW:
            tiles = replace(SMALL, run=run, narrow=narrow)
            chosen = choose_positions(request_for(weight, topk, 1), weights_for(weight, 1, run), tiles)
            assert torch.equal(chosen.positions.cpu().long(), order)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [1, 4])
def test_a_captured_step_follows_its_inputs_and_lengths(group: int) -> None:
    from attnopt.sparq_cache import Plan, SparqCache

    plan = Plan(2, 4, 700, 128, 128, torch.bfloat16, "cuda")
    q = torch.randn(2, 4 * group, 1, 128, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(2, 4, 1, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    prompt = [torch.randn(2, 4, 300, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    captured, plain = SparqCache(plan), SparqCache(plan)
    captured.step(q, k, v)  # warm
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.step(q, k, v)
    for cache in (captured, plain):
        cache.reset()
        cache.append(*prompt)
    for _ in range(5):
        for x in (q, k, v):
            x.normal_()
        graph.replay()
        assert torch.equal(out, plain.step(q, k, v))
    assert captured.lengths.tolist() == [305, 305]
