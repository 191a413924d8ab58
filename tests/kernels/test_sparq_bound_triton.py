"""Bounds in place of logits, for heads that share keys: what they bound, and that the choice stays the definition's."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_same
from sparq_cases import Case, assert_legal, cases, decisions, request_of
from sparq_judging import SMALL, assert_row_rule, by_head, positions_of, scored
from torch import Tensor

from attnopt.kernels.sparq import steps
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import Tiles
from attnopt.kernels.sparq.triton_bound import bound_runs
from attnopt.kernels.sparq.triton_decode import decode, is_bounded
from attnopt.kernels.sparq.triton_start import choose_channels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLACES = [
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
]
if not torch.cuda.is_available():
    PLACES += [("cpu", torch.float32)]
BOUNDED = replace(SMALL, bound_split=64, open_split=128, bounded=True, narrow=64)
#: Tiles of two runs, splits of two tiles.
WIDE = replace(BOUNDED, block=32, open_split=32)
#: The same without bounds.
STORED = replace(SMALL, split=64, weight_block=128)
NOWHERE = -(2**31)

#: Enough tiles for a bar, spread enough for runs below it.
LONG = Case(batch=1, kv_heads=2, group=4, sk=200, d=16, rank=8, topk=6, local=2, mean_value=False, spread=3.0)
SIZES = [
    Case(group=2, mean_value=False),
    Case(batch=1, group=3, sk=77, d=20, dv=12, topk=5, local=2, mean_value=False),
    Case(group=4, kv_heads=1, sk=150, topk=4, local=1, layout="sliced", mean_value=False),
    Case(group=2, kv_heads=1, sk=90, topk=30, mean_value=False, layout="expanded"),
    Case(batch=1, group=17, kv_heads=1, sk=60, d=16, topk=3, local=0, mean_value=False),
    Case(batch=1, group=2, sk=133, d=33, rank=17, topk=9, local=9, has_k_t=False, mean_value=False),
    LONG,
]


def open_runs(request: Request, tiles: Tiles) -> Tensor:
    """(P, runs) bool: the runs whose positions were weighed, where all positions count."""
    return scored(request, tiles)[1].best != NOWHERE


@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_it_keeps_the_row_rule(case: Case, device: str, dtype: torch.dtype) -> None:
    request, tiles = request_of(case, dtype, device), WIDE if case.group % 2 else BOUNDED
    assert is_bounded(request, tiles)
    positions = positions_of(request, tiles)
    assert_legal(request, by_head(request, positions))
    assert_row_rule(request, decode(request, tiles), positions, dtype)


@settings(max_examples=6)
@given(cases(longest=60, widest=16), st.integers(2, 5), st.integers(1, 4))
def test_any_shape_keeps_the_row_rule(case: Case, group: int, topk: int) -> None:
    few = replace(case, group=group, topk=topk, local=min(case.local, topk), mean_value=False, padding=0.0)
    request = request_of(replace(few, scale=case.scale / 3), device=DEVICE)
    positions = positions_of(request, BOUNDED)
    if positions is not None:
        assert_legal(request, by_head(request, positions))
    assert_row_rule(request, decode(request, BOUNDED), positions, torch.float32)


@pytest.mark.parametrize("tiles", [BOUNDED, WIDE, replace(BOUNDED, bound_split=32)], ids=str)
def test_bounds_hold_on_both_sides(tiles: Tiles) -> None:
    for spread in (0.5, 3.0):
        request = request_of(replace(LONG, spread=spread), device=DEVICE)
        found = bound_runs(request, choose_channels(request), tiles)
        top = found.part_max.amax(1, keepdim=True)
        whole = (found.part_sum * (found.part_max - top).exp2()).sum(1).log2() + top[:, 0]
        alone = (found.best - whole[:, None]).exp2().cpu()
        factor = (found.tile_scale - whole[:, None]).exp2().cpu()
        factor = factor.repeat_interleave(tiles.block // tiles.run, 1)[:, : alone.shape[1]]
        mixed, truth = found.mixed.cpu(), largest_of_runs(request, tiles.run)
        off = 1 + 1e-4
        assert (alone.amax(-1) <= truth * off).all()
        assert (truth <= alone.sum(-1) * off).all()
        assert (factor.amin(-1) * mixed <= truth * off).all()
        assert (truth <= factor.amax(-1) * mixed * off).all()


def largest_of_runs(request: Request, run: int) -> Tensor:
    """(P, runs): the largest weight of each run, by the definition."""
    weights = torch.stack([found.scores.sum(0) for found in decisions(request) if found is not None])
    return torch.nn.functional.pad(weights, (0, -weights.shape[1] % run)).unflatten(1, (-1, run)).amax(-1)


def test_most_runs_are_not_weighed() -> None:
    request = request_of(replace(LONG, sk=600), device=DEVICE)
    assert open_runs(request, replace(BOUNDED, bound_split=256, open_split=256)).float().mean() < 0.5


@pytest.mark.parametrize("case", [LONG, replace(LONG, spread=0.3), replace(LONG, scale=0.0)], ids=str)
def test_what_is_weighed_weighs_what_it_does_without_bounds(case: Case) -> None:
    request = request_of(case, device=DEVICE)
    _, bounded = scored(request, BOUNDED)
    _, stored = scored(request, STORED)
    is_open = (bounded.best != NOWHERE).repeat_interleave(16, 1)[:, : case.sk]
    torch.testing.assert_close(bounded.weight[is_open], stored.weight[is_open], rtol=1e-4, atol=1e-37)
    assert torch.equal(positions_of(request, BOUNDED), positions_of(request, STORED))


def test_equal_positions_are_chosen_in_order() -> None:
    request = request_of(replace(LONG, local=0), device=DEVICE)
    keys = torch.randn(3, 16, device=DEVICE).mul(2).round()  # whole numbers: no order of summation rounds
    which = (torch.arange(200, device=DEVICE) * 7919 % 97 % 3)[None, None].expand(1, 2, -1)
    k = keys[which]
    ties = replace(request, q=request.q.round(), k=k, k_t=k.mT.contiguous())
    positions = positions_of(ties, BOUNDED)
    assert torch.equal(positions, positions_of(ties, STORED))
    for mine, decision in zip(positions, decisions(ties), strict=True):
        assert mine.tolist() == decision.positions


def test_positions_that_all_weigh_the_same_are_chosen_in_order() -> None:
    request = request_of(LONG, device=DEVICE)
    positions = positions_of(replace(request, q=torch.zeros_like(request.q)), BOUNDED)
    assert positions.tolist() == [[0, 1, 2, 3, 198, 199]] * 2


def test_a_sink_for_some_heads_changes_no_choice() -> None:
    request = request_of(replace(LONG, spread=0.5), device=DEVICE)
    k = request.k.clone()
    k[:, :, 0] = 40 * request.q.view(1, 2, 4, 16)[:, :, 0]
    k[:, :, 150:154] = torch.arange(25, 29, device=DEVICE)[:, None] * request.q.view(1, 2, 4, 16)[:, :, 1:2]
    sunk = replace(request, k=k, k_t=k.mT.contiguous())
    positions = positions_of(sunk, WIDE)
    assert torch.equal(positions, positions_of(sunk, STORED))
    assert_legal(sunk, by_head(sunk, positions))
    assert_row_rule(sunk, decode(sunk, WIDE), positions, torch.float32)


@pytest.mark.parametrize("ends", [(13, 133), (64, 128), (16, 32), (70, 90), (199, 200), (7, 7)], ids=str)
def test_a_part_of_the_buffers_is_the_same_as_with_logits(ends: tuple[int, int]) -> None:
    request = request_of(replace(LONG, batch=2, kv_heads=1), device=DEVICE)
    first, last = ends
    outside = torch.ones(200, dtype=torch.bool, device=DEVICE)
    outside[first:last] = False
    k, v = request.k.clone(), request.v.clone()
    k[0, :, outside], v[0, :, outside] = torch.nan, torch.inf
    starts = torch.tensor([first, 0], device=DEVICE)
    lengths = torch.tensor([last, 200], device=DEVICE)
    ranged = replace(request, k=k, v=v, k_t=k.mT.contiguous(), starts=starts, lengths=lengths)
    out = decode(ranged, BOUNDED)
    assert torch.equal(out, decode(ranged, STORED))
    assert_same(out, steps.decode(ranged.masked()).double())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes in numpy, which warns of NaN
def test_a_key_that_is_not_a_number_chooses_what_it_does_without_bounds() -> None:
    request = request_of(LONG, device=DEVICE)
    k = request.k.clone()
    k[0, 0, 40, 3:9] = torch.nan
    broken = replace(request, k=k, k_t=k.mT.contiguous())
    assert torch.equal(positions_of(broken, BOUNDED), positions_of(broken, STORED))


def test_what_needs_the_logits_has_them() -> None:
    request = request_of(LONG, device=DEVICE)
    assert is_bounded(request, BOUNDED)
    assert not is_bounded(request, STORED)
    assert not is_bounded(replace(request, mean_value=True), BOUNDED)
    assert not is_bounded(request_of(replace(LONG, padding=0.3), device=DEVICE), BOUNDED)
    assert not is_bounded(replace(request, topk=40_000), BOUNDED)
    blended = replace(request, mean_value=True)
    positions = positions_of(blended, BOUNDED)
    assert_row_rule(blended, decode(blended, BOUNDED), positions, torch.float32)


def test_running_twice_gives_the_same_bits() -> None:
    request = request_of(LONG, device=DEVICE)
    assert torch.equal(decode(request, BOUNDED), decode(request, BOUNDED))
