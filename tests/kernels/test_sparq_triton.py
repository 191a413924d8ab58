"""The Triton path of SparQ: each kernel against the fp64 definition; interpreted without a GPU, compiled with one."""

from dataclasses import astuple, replace

import pytest
import torch
from hypothesis import given, settings
from oracle import assert_same
from sparq_cases import LAYOUTS, Case, answer, assert_legal, assert_scores, cases, request_of, yardstick
from torch import Tensor

from attnopt.kernels.sparq import steps
from attnopt.kernels.sparq.op import sparq_attention
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import MOST_PARTS, Tiles, choose_tiles
from attnopt.kernels.sparq.triton_attend import attend
from attnopt.kernels.sparq.triton_decode import choose_positions, decode
from attnopt.kernels.sparq.triton_score import Scores, approximate_logits, choose_channels, group_keys

#: Where the kernels run, and in what. The interpreter's bf16 arithmetic is wrong, so bf16 needs a GPU.
PLACES = [
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
]
if not torch.cuda.is_available():
    PLACES += [("cpu", torch.float16), ("cpu", torch.float32)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Small enough to interpret, and several splits, parts and tiles to every axis of the cases.
SMALL = Tiles(block=16, split=32, key_block=32, chosen_block=16, chosen_split=16)
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


def scores_of(request: Request, tiles: Tiles = SMALL) -> Scores:
    return approximate_logits(request, choose_channels(request), tiles)


def positions_of(request: Request, tiles: Tiles = SMALL) -> Tensor | None:
    if request.is_exact:
        return None
    return choose_positions(group_keys(request, scores_of(request, tiles), tiles), request.topk)


def by_head(request: Request, positions: Tensor | None) -> Tensor | None:
    return None if positions is None else positions.cpu().view(*request.k.shape[:2], -1)


def probabilities(request: Request, scores: Scores) -> Tensor:
    """(B, Hkv, G, Sk) from the base-2 logits and the parts of their softmax."""
    top = scores.part_max.amax(1, keepdim=True).nan_to_num(neginf=0.0)
    total = (scores.part_sum * (scores.part_max - top).exp2()).sum(1)
    weights = (scores.logits - top[:, 0, :, None]).exp2() / total.where(total > 0, 1.0)[..., None]
    return weights.view(*request.k.shape[:2], request.group, -1)


def assert_row_rule(request: Request, out: Tensor, positions: Tensor | None, dtype: torch.dtype) -> None:
    where = by_head(request, positions)
    request = request if positions is not None else replace(request, mean_value=False)
    assert_same(out, answer(request, where, torch.float64), yardstick(request, where, dtype))


@pytest.mark.parametrize("case", SIZES, ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_it_keeps_the_row_rule(case: Case, device: str, dtype: torch.dtype) -> None:
    request = request_of(case, dtype, device)
    positions = positions_of(request)
    if positions is not None:
        assert_legal(request, by_head(request, positions))
    assert_row_rule(request, decode(request, SMALL), positions, dtype)


@pytest.mark.parametrize("case", SIZES[:5], ids=str)
@pytest.mark.parametrize(("device", "dtype"), PLACES)
def test_scores_are_those_of_the_definition(case: Case, device: str, dtype: torch.dtype) -> None:
    request = request_of(replace(case, spread=8.0, scale=1.0), dtype, device)
    assert_scores(request, probabilities(request, scores_of(request)))


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
        replace(SMALL, key_block=64),
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
    out = attend(replace(request, k=k, v=v), positions, None, SMALL)
    assert torch.equal(out, attend(request, positions, None, SMALL))
    assert_row_rule(request, out, positions, torch.float32)


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
            assert 1 <= -(-sk // tiles.split) <= MOST_PARTS
            assert 1 <= -(-min(topk, sk) // tiles.chosen_split) <= MOST_PARTS
            assert tiles.split % tiles.block == tiles.chosen_split % tiles.chosen_block == 0
            assert all(size >= 16 and size & (size - 1) == 0 for size in astuple(tiles))


# On a GPU only.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("d", [1, 3, 16, 40, 64, 80, 96, 128, 160, 256])
def test_default_tiles_keep_the_row_rule(d: int, dtype: torch.dtype) -> None:
    for case in (
        Case(group=1, sk=3000, d=d, dv=d, rank=32, topk=128, local=32),
        Case(group=4, sk=5001, d=d, dv=d, rank=32, topk=600, local=32, padding=0.2),
        Case(group=4, sk=1500, d=d, dv=d, topk=1500),
    ):
        request = request_of(case, dtype, "cuda")
        tiles = choose_tiles(request)
        positions = positions_of(request, tiles)
        assert_row_rule(request, decode(request), positions, dtype)


@pytest.mark.gpu
def test_the_op_takes_the_kernels_on_a_gpu() -> None:
    r = request_of(Case(group=2, padding=0.2), torch.bfloat16, "cuda")
    out = sparq_attention(
        r.q, r.k, r.v, rank=5, topk=12, local=3, k_t=r.k_t, scale=r.scale, key_padding=r.kept, mean_value=True
    )  # fmt: skip
    assert torch.equal(out, decode(r))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_are_right() -> None:
    request = request_of(Case(batch=1, kv_heads=1, sk=300, d=16, dv=16, topk=20), torch.bfloat16, "cuda")
    wide = torch.empty(300 * 2**23, dtype=torch.bfloat16, device="cuda")
    strided = {}
    for i, name in enumerate(("k", "v")):
        strided[name] = wide.as_strided((1, 1, 300, 16), (0, 0, 2**23, 1), storage_offset=16 * i)
        strided[name].copy_(getattr(request, name))
    k_t = wide.as_strided((1, 1, 16, 300), (0, 0, 1, 2**23), storage_offset=64)
    assert request.k_t is not None
    strided["k_t"] = k_t.copy_(request.k_t)
    assert torch.equal(decode(replace(request, **strided)), decode(request))


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs() -> None:
    request = request_of(Case(group=2, sk=500, padding=0.2), torch.bfloat16, "cuda")
    decode(request)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode(request)
    for _ in range(3):
        request.q.normal_()
        graph.replay()
        assert torch.equal(out, decode(request))


@pytest.mark.gpu
def test_a_hundred_runs_give_the_same_bits() -> None:
    request = request_of(Case(group=4, sk=5000, d=128, dv=128, rank=32, topk=600), torch.bfloat16, "cuda")
    first = decode(request)
    assert all(torch.equal(decode(request), first) for _ in range(100))
