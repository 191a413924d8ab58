"""SparQ attention in plain torch: each step against its fp64 definition, and the laws of the whole."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same
from sparq_cases import (
    LAYOUTS,
    Case,
    answer,
    assert_legal,
    assert_scores,
    attention,
    cases,
    request_of,
    yardstick,
)

from attnopt.kernels.sparq import steps
from attnopt.kernels.sparq.op import sparq_attention
from attnopt.kernels.sparq.plain import sparq_reference
from attnopt.kernels.sparq.request import Request

HALVES = (torch.bfloat16, torch.float16)


def exact(request: Request) -> torch.Tensor:
    return answer(replace(request, mean_value=False), None, torch.float64)


def scores_and_positions(request: Request) -> tuple[torch.Tensor, torch.Tensor]:
    q = steps.grouped(request)
    channels = steps.choose_channels(q, request.channels)
    scores = steps.approximate_scores(q, request.keys_by_channel, channels, request.scale, request.kept)
    topk = min(request.topk, request.k.shape[2])
    return scores, steps.choose_positions(scores, topk, request.local, request.kept)


def positions_of(request: Request) -> torch.Tensor | None:
    return None if request.is_exact else scores_and_positions(request)[1]


@given(cases())
def test_channels_are_those_with_the_largest_queries(case: Case) -> None:
    request = request_of(case)
    weight = steps.grouped(request).abs().sum(2)
    chosen = steps.choose_channels(steps.grouped(request), request.channels)
    best = weight.sort(descending=True).values[..., : request.channels]
    assert torch.equal(weight.gather(-1, chosen).sort(descending=True).values, best)
    assert (chosen.diff() > 0).all()


@given(cases(), st.sampled_from([torch.float32, *HALVES]))
def test_scores_are_the_softmax_of_the_chosen_channels(case: Case, dtype: torch.dtype) -> None:
    request = request_of(case, dtype)
    assert_scores(request, scores_and_positions(request)[0])


@given(cases())
def test_positions_are_the_best_by_value_and_the_local_ones(case: Case) -> None:
    request = request_of(case)
    positions = positions_of(request)
    if positions is None:
        return
    assert_legal(request, positions)
    assert (positions.diff() > 0).all()


def moderate(case: Case) -> Case:
    """Logits of a few units: their own rounding, which is eager's too, stays below the row rule's floor."""
    return replace(case, spread=1.0, scale=case.scale / 3)


@given(cases().map(moderate), st.sampled_from([torch.float32, *HALVES]))
def test_the_whole_keeps_the_row_rule(case: Case, dtype: torch.dtype) -> None:
    request = request_of(case, dtype)
    positions = positions_of(request)
    eager = yardstick(request, positions, dtype)
    assert_same(attention(request), answer(request, positions, torch.float64), eager)


@given(cases())
def test_in_fp64_it_is_the_literal_algorithm(case: Case) -> None:
    r = request_of(replace(case, mean_value=True), torch.float64)
    for mean_value in (None, True, False):
        literal = sparq_reference(
            r.q, r.k, r.v, rank=r.rank, topk=r.topk, local=r.local, scale=r.scale, key_padding=r.kept,
            mean_value=mean_value,
        )  # fmt: skip
        out = sparq_attention(
            r.q, r.k, r.v, rank=r.rank, topk=r.topk, local=r.local, k_t=r.k_t, scale=r.scale, key_padding=r.kept,
            mean_value=mean_value,
        )  # fmt: skip
        torch.testing.assert_close(out, literal, rtol=1e-11, atol=1e-12)


@given(cases().map(moderate), st.sampled_from([torch.float32, *HALVES]))
def test_choosing_every_position_is_exact_attention(case: Case, dtype: torch.dtype) -> None:
    request = request_of(replace(case, topk=case.sk + 1, local=0), dtype)
    eager = yardstick(replace(request, mean_value=False), None, dtype)
    assert_same(attention(request), exact(request), eager)


def test_choosing_every_kept_position_is_exact_attention() -> None:
    request = request_of(Case(padding=0.8, topk=40))
    assert request.kept is not None
    assert 0 < int(request.kept.sum(-1).max()) <= request.topk
    assert not request.is_exact
    assert_same(attention(request), exact(request))


def test_the_default_scale_is_the_usual_one_whatever_is_approximated() -> None:
    r = request_of(Case(scale=16**-0.5))
    assert torch.equal(sparq_attention(r.q, r.k, r.v, rank=5, topk=12, local=3, k_t=r.k_t), attention(r))


@given(cases(), st.integers(0, 3))
def test_reading_every_channel_makes_the_scores_exact(case: Case, more: int) -> None:
    request = request_of(replace(case, rank=case.d + more), torch.float64)
    scores, _ = scores_and_positions(request)
    logits = request.scale * (steps.grouped(request) @ request.k.mT)
    exactly = steps.masked_softmax(logits, steps.kept_at(request.kept, None))
    torch.testing.assert_close(scores, exactly, rtol=1e-11, atol=1e-300)


def test_each_head_has_its_own_softmax_before_the_group_is_summed() -> None:
    # Head 0 puts its weight on key 0. Head 1 shares its own among keys 1, 2 and 3, by logits a hundred times as large.
    q = torch.tensor([[1.0, 0.0], [0.0, 100.0]]).view(1, 2, 1, 2)
    k = torch.tensor([[9.0, -1.0], [0.0, 1.002], [0.0, 1.001], [0.0, 1.0]]).view(1, 1, 4, 2)
    v = torch.eye(4)[None, None]
    out = sparq_attention(q, k, v, rank=2, topk=2, local=0, scale=1.0)
    assert out[0, 0, 0].nonzero().flatten().tolist() == [0, 1]
    summed_before = (q[0, :, 0] @ k[0, 0].T).sum(0)
    assert summed_before.topk(2).indices.tolist() == [1, 2]


def test_heads_of_a_group_follow_one_another() -> None:
    r = request_of(Case(kv_heads=3, group=2, mean_value=False, topk=60))
    v = torch.arange(3.0)[None, :, None, None].expand(2, 3, 50, 1)
    out = attention(replace(r, v=v))
    assert torch.equal(out[0, :, 0, 0].round(), torch.tensor([0.0, 0, 1, 1, 2, 2]))


def test_equal_heads_in_a_group_are_one_head() -> None:
    single = request_of(Case(kv_heads=2))
    grouped = replace(single, q=single.q.repeat_interleave(4, dim=1))
    assert_same(attention(grouped), attention(single).repeat_interleave(4, dim=1).double(), factor=1.0)


def test_the_mean_value_is_left_out_by_default_only_where_heads_share() -> None:
    for group in (1, 2):
        r = request_of(Case(group=group))
        out = sparq_attention(r.q, r.k, r.v, rank=5, topk=12, local=3, k_t=r.k_t, scale=r.scale)
        assert torch.equal(out, attention(replace(r, mean_value=group == 1)))


def test_a_given_mean_takes_the_weight_that_is_left() -> None:
    r = request_of(Case())
    without = attention(replace(r, v_mean=torch.zeros(2, 2, 16)))
    ones = attention(replace(r, v=torch.zeros_like(r.v), v_mean=torch.ones(2, 2, 16)))
    left = 1 - steps.covered_mass(*scores_and_positions(r), None)
    torch.testing.assert_close(ones, left.expand(2, 2, 1, 16).contiguous())
    mean = r.v.mean(2, keepdim=True)
    assert_same(attention(r), (without + left * mean).double(), factor=4.0)


@given(cases())
def test_what_padding_holds_changes_nothing(case: Case) -> None:
    request = request_of(replace(case, padding=0.4, layout="plain"))
    k, v = request.k.nan_to_num(0.0), request.v.nan_to_num(0.0, posinf=0.0)
    k_t = None if request.k_t is None else request.k_t.nan_to_num(0.0)
    clean = attention(replace(request, k=k, v=v, k_t=k_t))
    assert clean.isfinite().all()
    assert torch.equal(attention(request), clean)


def test_padding_keys_away_is_removing_them() -> None:
    request = request_of(Case(batch=1, padding=0.5))
    kept = request.kept[0]
    k, v, k_t = request.k[:, :, kept], request.v[:, :, kept], request.k_t[..., kept]
    removed = attention(replace(request, k=k, v=v, k_t=k_t, kept=None))
    assert_same(attention(request), removed.double())


def test_a_row_with_no_key_is_zero() -> None:
    request = request_of(Case())
    kept = torch.tensor([True, False])[:, None].expand(2, 50)
    for topk in (12, 50):
        out = attention(replace(request, kept=kept, topk=topk))
        assert (out[0] != 0).all()
        assert (out[1] == 0).all()


@pytest.mark.parametrize("case", [Case(sk=0), Case(batch=0), Case(kv_heads=0), Case(dv=0)], ids=repr)
def test_nothing_to_attend_to_is_zero(case: Case) -> None:
    r = request_of(case)
    out = attention(r)
    assert out.shape == (case.batch, case.kv_heads * case.group, 1, case.dv)
    assert (out == 0).all()


def test_a_zero_query_weighs_the_chosen_alike() -> None:
    request = request_of(Case(group=2, mean_value=False))
    q = request.q.clone()
    q[:, 0] = 0
    chosen = torch.arange(50)
    for zeroed in (q, torch.zeros_like(q)):
        out = attention(replace(request, q=zeroed))
        assert out.isfinite().all()
    want = request.v[:, :, (chosen < 9) | (chosen >= 47)].mean(
        2
    )  # equal scores: the first, and the local ones
    torch.testing.assert_close(out[:, ::2, 0], want)


def test_a_query_that_is_zero_on_the_chosen_channels_makes_no_nan() -> None:
    q = torch.zeros(1, 2, 1, 4)
    q[0, 0, 0, :2], q[0, 1, 0, 3] = 5.0, 0.1  # the group chooses channels 0 and 1, where head 1 is zero
    k, v = torch.randn(1, 1, 30, 4), torch.randn(1, 1, 30, 4)
    assert sparq_attention(q, k, v, rank=2, topk=8, local=2, mean_value=True).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_among_equals_the_lower_index_wins(dtype: torch.dtype) -> None:
    values = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0, torch.inf, -1.0, 0.0, 0.0]], dtype=dtype)
    wanted = {1: [6], 2: [1, 6], 4: [1, 2, 3, 6], 5: [1, 2, 3, 4, 6], 8: [0, 1, 2, 3, 4, 5, 6, 8]}
    assert {n: steps.top_indices(values, n)[0].tolist() for n in wanted} == wanted


@given(st.lists(st.integers(0, 5), min_size=1, max_size=400), st.data())
def test_ties_are_settled_as_a_stable_sort_would(values: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    stable = sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
    assert steps.top_indices(torch.tensor(values, dtype=torch.float32), count).tolist() == sorted(stable)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_changes_nothing(layout: str) -> None:
    request = request_of(Case(layout=layout, padding=0.3, group=2))
    packed = (None if x is None else x.contiguous() for x in (request.k_t, request.v_mean, request.kept))
    q, k, v = (x.contiguous() for x in (request.q, request.k, request.v))
    choices = (request.rank, request.topk, request.local, request.scale, request.mean_value)
    same = Request(q, k, v, *packed, *choices)
    assert torch.equal(scores_and_positions(request)[1], scores_and_positions(same)[1])
    assert_same(attention(request), attention(same).double())


def test_the_channel_major_copy_is_what_scores_read() -> None:
    request = request_of(Case(mean_value=False))
    assert torch.equal(attention(request), attention(replace(request, k_t=None)))
    flipped = attention(replace(request, k_t=request.k.mT.flip(-1)))
    assert not torch.equal(attention(request), flipped)


def test_what_is_not_chosen_is_not_read() -> None:
    request = request_of(Case())
    _, positions = scores_and_positions(request)
    chosen = torch.zeros(2, 2, 50, dtype=torch.bool).scatter(2, positions, value=True)[..., None]
    poisoned = replace(
        request,
        k=request.k.masked_fill(~chosen, torch.nan),
        v=request.v.masked_fill(~chosen, torch.inf),
        v_mean=request.v.mean(2),
    )
    assert torch.equal(attention(poisoned), attention(request))


def test_running_twice_gives_the_same_bits_and_leaves_the_inputs_alone() -> None:
    request = request_of(Case(padding=0.3))
    before = [x.clone() for x in (request.q, request.k, request.v, request.k_t)]
    assert torch.equal(attention(request), attention(request))
    for was, x in zip(before, (request.q, request.k, request.v, request.k_t), strict=True):
        assert torch.equal(was.nan_to_num(), x.nan_to_num())


@pytest.mark.parametrize("scale", [0.0, -2.0, 8.0, 4096.0])
def test_any_scale_keeps_the_row_rule(scale: float) -> None:
    drawn = request_of(Case(scale=scale, spread=3.0, mean_value=False))
    request = replace(
        drawn, q=drawn.q.round(), k=drawn.k.round(), k_t=None
    )  # so that fp32 holds the logits exactly
    positions = positions_of(request)
    assert_same(attention(request), answer(request, positions, torch.float64))


def test_a_nan_in_the_query_reaches_its_own_group_only() -> None:
    request = request_of(Case(group=2))
    q = request.q.clone()
    q[0, 1, 0, 3] = torch.nan
    out = attention(replace(request, q=q))
    assert out[0, 1].isnan().all()
    assert torch.equal(out[1], attention(request)[1])
    assert torch.equal(out[0, 2:], attention(request)[0, 2:])
