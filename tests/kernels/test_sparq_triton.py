"""The Triton path of SparQ: each kernel against the fp64 definition; interpreted without a GPU, compiled with one."""

from dataclasses import astuple, replace

import pytest
import torch
from hypothesis import given, settings
from sparq_cases import (
    LAYOUTS,
    Case,
    assert_legal,
    assert_scores,
    cases,
    request_of,
)
from sparq_judging import (
    DEVICE,
    DOTS,
    PLACES,
    SMALL,
    assert_row_rule,
    by_head,
    positions_of,
    probabilities,
    scored,
)

from attnopt.kernels.sparq import steps
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import MOST_PARTS, Tiles, choose_tiles
from attnopt.kernels.sparq.triton_attend import attend
from attnopt.kernels.sparq.triton_decode import decode
from attnopt.kernels.sparq.triton_select import Chosen
from attnopt.kernels.sparq.triton_start import choose_channels

SIZES = [
    Case(),
    Case(group=3, kv_heads=2, sk=77, d=20, dv=12, topk=40, local=7),
    Case(group=4, kv_heads=1, sk=64, padding=0.5, layout="sliced"),
    Case(batch=1, kv_heads=3, sk=33, d=33, dv=40, rank=17, topk=17, layout="transposed", has_k_t=False),
    Case(group=2, sk=90, padding=0.8, topk=30, mean_value=False, layout="expanded"),
    Case(group=17, kv_heads=1, sk=20, d=16, topk=6, local=6),
    Case(sk=1, topk=1, local=0, d=1, dv=1, rank=1),
    Case(sk=40, topk=40, padding=0.4, group=2),
    Case(sk=35, topk=1, local=0, dv=80, d=70, rank=90),
]


@pytest.mark.parametrize("tiles", [SMALL, DOTS], ids=["rows", "dots"])
@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_it_keeps_the_row_rule(case: Case, device: str, dtype: torch.dtype, tiles: Tiles) -> None:
    request = request_of(case, dtype, device)
    positions = positions_of(request, tiles)
    if positions is not None:
        assert_legal(request, by_head(request, positions))
    assert_row_rule(request, decode(request, tiles), positions, dtype)


@pytest.mark.parametrize("case", SIZES[:5], ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_scores_are_those_of_the_definition(case: Case, device: str, dtype: torch.dtype) -> None:
    request = request_of(replace(case, spread=8.0, scale=1.0), dtype, device)
    for tiles in (SMALL, DOTS):
        assert_scores(request, probabilities(request, scored(request, tiles)[0]))


@settings(max_examples=15)
@given(cases(longest=40, widest=20))
def test_any_shape_keeps_the_row_rule(case: Case) -> None:
    request = request_of(replace(case, spread=1.0, scale=case.scale / 3), device=DEVICE)
    positions = positions_of(request)
    if positions is not None:
        assert_legal(request, by_head(request, positions))
    assert_row_rule(request, decode(request, SMALL), positions, torch.float32)


@pytest.mark.parametrize("case", SIZES, ids=str)
def test_channels_are_those_of_the_torch_path(case: Case) -> None:
    request = request_of(case, device=DEVICE)
    ties = replace(request, q=request.q.round())  # many equal sizes, many zeros
    for one in (request, ties):
        chosen, q = choose_channels(one), steps.grouped(one)
        index = steps.choose_channels(q, one.channels)
        assert torch.equal(chosen.index.long().view_as(index), index)
        q_r = q.gather(-1, index[:, :, None].expand(*q.shape[:3], -1))
        assert torch.equal(chosen.queries.view_as(q_r), q_r)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter computes in numpy, which warns of NaN
def test_not_a_number_in_a_query_still_chooses_different_channels() -> None:
    request = request_of(Case(group=2), device=DEVICE)
    q = request.q.clone()
    q[0, 1, 0, 3:9], q[1, 0, 0, 2] = torch.nan, torch.inf
    chosen = choose_channels(replace(request, q=q)).index
    assert (chosen.diff() > 0).all()
    assert ((chosen >= 0) & (chosen < 16)).all()
    assert chosen.view(2, 2, 5)[0, 0].tolist() == [3, 4, 5, 6, 7]
    assert decode(replace(request, q=q), SMALL)[0, 1].isnan().all()


def test_among_equal_positions_the_lower_index_wins() -> None:
    request = request_of(Case(sk=70, topk=20, local=4, mean_value=False), device=DEVICE)
    equal = replace(request, q=torch.zeros_like(request.q))
    positions = positions_of(equal)
    assert positions is not None
    assert positions.sort().values.tolist() == [[*range(16), *range(66, 70)]] * 4


def test_padded_positions_come_last() -> None:
    request = request_of(Case(batch=1, kv_heads=1, sk=40, topk=20, local=4, padding=0.7), device=DEVICE)
    assert request.kept is not None
    kept = request.kept[0].nonzero().flatten().tolist()
    assert 4 < len(kept) < 20
    positions = positions_of(request)
    assert positions is not None
    assert set(kept) <= set(positions[0].tolist())


def test_a_row_with_no_key_is_zero_whatever_it_holds() -> None:
    request = request_of(Case(group=2), device=DEVICE)
    kept = torch.tensor([True, False], device=DEVICE)[:, None].expand(2, 50)
    k, v = request.k.clone(), request.v.clone()
    k[1], v[1] = torch.nan, torch.inf
    for topk in (12, 50):
        for tiles in (SMALL, replace(SMALL, chosen_split=64)):
            out = decode(replace(request, k=k, v=v, k_t=None, kept=kept, topk=topk), tiles)
            assert (out[0] != 0).all()
            assert (out[1] == 0).all()


def test_a_zero_query_makes_no_nan() -> None:
    request = request_of(Case(group=2), device=DEVICE)
    out = decode(replace(request, q=torch.zeros_like(request.q)), SMALL)
    assert out.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str) -> None:
    request = request_of(Case(layout=layout, padding=0.3, group=2), device=DEVICE)
    assert request.kept is not None
    kept = request.kept.repeat_interleave(3, dim=1)[:, ::3]
    packed = {n: getattr(request, n).contiguous() for n in ("q", "k", "v", "k_t", "kept")}
    mean = steps.mean_of_values(request)
    spread = mean.repeat_interleave(2, dim=-1)[..., ::2]
    out = decode(replace(request, kept=kept, v_mean=spread), SMALL)
    assert torch.equal(out, decode(replace(request, **packed, v_mean=mean), SMALL))


@pytest.mark.parametrize(
    "tiles",
    [
        replace(SMALL, block=32, split=64),
        replace(SMALL, weight_block=64),
        replace(SMALL, block=32, row_block=32, run=32),
        replace(SMALL, chosen_block=32, chosen_split=32),
        replace(SMALL, chosen_split=48),
        replace(SMALL, split=128, chosen_split=64),
    ],
    ids=str,
)
def test_how_the_work_is_cut_changes_only_rounding(tiles: Tiles) -> None:
    request = request_of(Case(group=2, sk=77, padding=0.3, topk=40), device=DEVICE)
    positions = positions_of(request, tiles)
    assert positions is not None
    assert_legal(request, by_head(request, positions))
    assert_row_rule(request, decode(request, tiles), positions, torch.float32)


def test_attention_over_given_positions_reads_nothing_else() -> None:
    request = request_of(Case(group=2, mean_value=False), device=DEVICE)
    positions = torch.stack([torch.randperm(50)[:20] for _ in range(4)]).to(DEVICE)
    chosen = torch.zeros(4, 50, dtype=torch.bool, device=DEVICE).scatter(1, positions, value=True)
    hidden = ~chosen.view(2, 2, 50, 1)
    k, v = request.k.masked_fill(hidden, torch.nan), request.v.masked_fill(hidden, torch.inf)
    choice = Chosen(positions, positions.new_full((4,), 50))
    out = attend(replace(request, k=k, v=v), choice, None, SMALL)
    assert torch.equal(out, attend(request, choice, None, SMALL))
    assert_row_rule(request, out, positions, torch.float32)


@pytest.mark.parametrize("group", [1, 4])
def test_default_tiles_choose_the_best_of_many_positions(group: int) -> None:
    case = Case(batch=1, kv_heads=1, group=group, sk=6_000, d=32, topk=100, local=10, rank=8)
    request = request_of(case, device=DEVICE)
    positions = positions_of(request, choose_tiles(request))
    assert positions is not None
    assert_legal(request, by_head(request, positions))
    assert_row_rule(request, decode(request), positions, torch.float32)


def test_running_twice_gives_the_same_bits() -> None:
    request = request_of(Case(group=3, sk=90, padding=0.2, topk=40), device=DEVICE)
    assert torch.equal(decode(request, SMALL), decode(request, SMALL))


def test_tiles_cover_the_sequence_in_few_parts() -> None:
    for sk in (1, 100, 4096, 5000, 131_072, 3_000_000):
        for batch, topk in ((1, 1), (1, 4096), (300, 200)):
            shape = torch.empty(batch, 4, 1, 1, device="meta")
            k = shape.expand(batch, 4, sk, 128)
            tiles = choose_tiles(
                Request(shape.expand(batch, 4, 1, 128), k, k, None, None, None, 32, topk, 1, 1.0, True)
            )
            assert all(
                1 <= -(-sk // split) <= MOST_PARTS
                for split in (tiles.split, tiles.bound_split, tiles.open_split)
            )
            assert 1 <= -(-min(topk, sk) // tiles.chosen_split) <= MOST_PARTS
            assert tiles.split % tiles.block == tiles.chosen_split % tiles.chosen_block == 0
            assert (
                tiles.split % tiles.row_block
                == tiles.row_block % tiles.run
                == tiles.weight_block % tiles.run
                == 0
            )
            sizes = [size for size in astuple(tiles) if not isinstance(size, bool)]
            sizes.remove(tiles.row_stages)
            sizes.remove(tiles.dot_heads)
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
