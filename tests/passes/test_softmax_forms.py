"""Forms of the softmax and of what follows it: each is read, checked in fp64, and computes what eager computes."""

import re

import pytest
import torch
from compiling import check_like_eager, compiled, reports_after
from graphs import shadow_of
from spellings import FIXED
from spellings_forms import FORMS, Form
from torch import Tensor
from torch.nn import functional

import attnopt
from attnopt.pipeline import read
from attnopt.registry import rules

B, H, SQ, SK, D = 2, 4, 5, 9, 16


def wanted(form: Form, *, symbolic: bool) -> str:
    """The spec as the report prints it; without the scale, of which a size may be part, where sizes are symbolic."""
    empty_row = (form.empty_row_symbolic if symbolic else None) or form.empty_row
    said = (
        "softmax",
        "" if symbolic else f"scale={form.scale:.6g}",
        f"gqa={form.share}" if form.share != 1 else "",
        form.mask,
        f"empty={empty_row}" if empty_row != "never" else "",
        form.sinks,
    )
    return " ".join(filter(None, said))


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_a_form_is_read_and_computes_what_eager_computes(form: Form) -> None:
    report = check_like_eager(form.attend, form.inputs(), differentiable=form.differentiable)
    (site,) = report.attention
    assert (site.verdict, site.spec) == ("rewritten", wanted(form, symbolic=False)), site.reason
    assert site.error is not None
    assert site.error <= 1e-9


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.name)
def test_a_form_is_read_with_symbolic_sizes(form: Form) -> None:
    report = check_like_eager(form.attend, form.inputs(), dynamic=None, fixed=FIXED)
    (site,) = report.attention
    found = " ".join(word for word in site.spec.split() if not word.startswith("scale="))
    assert (site.verdict, found) == ("rewritten", wanted(form, symbolic=True)), site.reason


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


def tensors() -> tuple[Tensor, ...]:
    return torch.randn(B, H, SQ, D), torch.randn(B, H, SK, D), torch.randn(B, H, SK, D)


# --- values that something else needs too ---


def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores_of(q, k).softmax(-1)
    return weights @ v, weights  # codertimo/BERT-pytorch


def weights_in_a_loss(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores_of(q, k).softmax(-1)
    return weights @ v, (weights * weights.log()).sum()


def weights_times_two_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    return weights @ v + weights @ v.sin()


def weights_behind_a_sink_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = functional.pad(scores_of(q, k), (0, 1)).softmax(-1)[..., :-1]
    return weights @ v, weights.mean(1)


@pytest.mark.parametrize(
    "attend",
    [weights_returned, weights_in_a_loss, weights_times_two_values, weights_behind_a_sink_returned],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_weights_that_something_else_needs_are_checked_and_kept(attend: object, *, dynamic: bool) -> None:
    (site,) = check_like_eager(attend, tensors(), differentiable=3, dynamic=dynamic).attention
    assert (site.verdict, site.kernel) == ("kept", None)
    assert "so they must be computed anyway" in site.reason
    assert site.error is not None
    assert site.error <= 1e-9


def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores_of(q, k)
    return scores.softmax(-1) @ v, scores  # openai/whisper


def scores_before_the_mask_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores_of(q, k)
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(5)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v, scores.float().mean(1)


@pytest.mark.parametrize(
    "attend", [scores_returned, scores_before_the_mask_returned], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_scores_that_something_else_needs_stay_beside_the_call(attend: object, *, dynamic: bool) -> None:
    (site,) = check_like_eager(attend, tensors(), differentiable=3, dynamic=dynamic).attention
    assert site.verdict == "rewritten", site.reason


def test_scores_of_two_softmaxes_are_two_sites() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = scores_of(q, k)
        return scores.softmax(-1) @ v + scores.mul(2).softmax(-1) @ v

    report = check_like_eager(attend, tensors(), differentiable=3)
    assert [site.verdict for site in report.attention] == ["rewritten", "rewritten"]


def scores_written_to_and_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores_of(q, k)
    out = scores.softmax(-1) @ v
    return out, scores.mul_(2)


def weights_written_to_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    weights[..., 0] = 0.0
    return weights @ v


def scores_filled_in_place_and_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores_of(q, k)
    seen = scores.sin()
    scores.masked_fill_(torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(5), -torch.inf)
    return scores.softmax(-1) @ v, seen


@pytest.mark.parametrize(
    "attend",
    [scores_written_to_and_returned, weights_written_to_through_a_view, scores_filled_in_place_and_returned],
    ids=lambda f: f.__name__,
)
def test_inner_values_that_are_written_to_and_used_elsewhere_are_refused(attend: object) -> None:
    (site,) = check_like_eager(attend, tensors()).attention
    assert site.verdict == "refused"
    assert "is written to in place" in site.reason


def test_differential_attention_is_two_sites() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
        (q1, q2), (k1, k2) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)
        return scores_of(q1, k1).softmax(-1) @ v - mix * (
            scores_of(q2, k2).softmax(-1) @ v
        )  # arXiv 2410.05258

    report = check_like_eager(attend, (*tensors(), torch.rand(())), differentiable=4)
    assert [site.verdict for site in report.attention] == ["rewritten", "rewritten"]


# --- operands that are written in pieces ---


def test_keys_written_into_fresh_memory_piece_by_piece_are_read() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = torch.empty_like(k)  # HF glm4_moe_lite
        keys[..., : D // 2] = k[..., : D // 2]
        keys[..., D // 2 :] = k[..., D // 2 :].sin()
        return scores_of(q, keys).softmax(-1) @ v

    (site,) = check_like_eager(attend, tensors(), differentiable=3).attention
    assert site.verdict == "rewritten", site.reason


def test_keys_written_to_after_they_were_read_are_refused() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys = k * 1
        scores = scores_of(q, keys)
        keys[..., 0] = 3.0
        return scores.softmax(-1) @ v + keys.sum()

    (site,) = check_like_eager(attend, tensors()).attention
    assert site.verdict == "refused"
    assert "k is written to in place" in site.reason


# --- dropout in training ---


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.dropout(scores_of(q, k).softmax(-1), p=0.5, training=True).to(v.dtype) @ v


def test_dropout_on_the_weights_stays_with_other_random_numbers() -> None:
    q, k, _ = tensors()
    v = torch.eye(SK).expand(B, H, SK, SK)  # the output is the weights
    before = attnopt.reports()
    out = compiled(dropped)(q, k, v)
    (site,) = reports_after(before).attention
    assert (site.verdict, site.spec, site.kernel) == (
        "rewritten",
        "softmax scale=0.25 full dropout=0.5",
        "sdpa",
    )
    assert "other random numbers" in site.reason
    weights = scores_of(q, k).softmax(-1)
    kept = out != 0
    torch.testing.assert_close(out[kept], 2 * weights[kept])
    assert 0.3 < kept.float().mean() < 0.7


def test_two_draws_differ_and_have_the_right_mean() -> None:
    q, k, v = tensors()
    run = compiled(dropped)
    draws = torch.stack([run(q, k, v) for _ in range(400)])
    assert not torch.equal(draws[0], draws[1])
    spread = draws.std(0) / 20
    error = (draws.mean(0) - scores_of(q, k).softmax(-1) @ v).abs()
    assert float((error / spread).max()) < 6


def test_dropout_that_is_applied_twice_or_leaves_nothing_is_refused() -> None:
    def twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.dropout(functional.dropout(scores_of(q, k).softmax(-1), 0.5), 0.5) @ v

    def all_of_it(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.dropout(scores_of(q, k).softmax(-1), 1.0) @ v

    for attend, reason in ((twice, "dropout twice"), (all_of_it, "leaves nothing")):
        (found,) = read(shadow_of(attend, *tensors()), rules())
        assert found.reject is not None
        assert reason in found.reject.reason


# --- near misses of the sinks, and of what follows the softmax ---


def column_not_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.pad(scores_of(q, k), (0, 1)).softmax(-1) @ functional.pad(v, (0, 0, 0, 1), value=2.0)


def other_column_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.pad(scores_of(q, k), (0, 1)).softmax(-1)[..., 1:] @ v


def columns_on_both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.pad(scores_of(q, k), (1, 1)).softmax(-1)[..., 1:-1] @ v


def other_columns_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.pad(scores_of(q, k), (0, 2)).softmax(-1)[..., 2:] @ v


def more_columns_dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.pad(scores_of(q, k), (0, 2)).softmax(-1)[..., :-3] @ v[:, :, 1:]


def number_added_beside_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    sinks = q[:, :, :, :1] * 0
    return torch.cat([scores_of(q, k) + 3.0, sinks], -1).softmax(-1)[..., :-1] @ v


def maximum_subtracted_beside_a_sink(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores = scores - scores.amax(-1, keepdim=True)
    return functional.pad(scores, (0, 1)).softmax(-1)[..., :-1] @ v


def masked_by_another_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return (
        scores_of(q, k).masked_fill(hidden.triu(4), -torch.inf).softmax(-1).masked_fill(hidden.triu(3), 0) @ v
    )


def weights_times_themselves(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    return (weights * weights) @ v


def weights_by_their_square_root(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    return (weights / weights.sqrt().sum(-1, keepdim=True)) @ v


def weights_filled_with_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(5)
    return scores_of(q, k).masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 1.0) @ v


def weights_per_pair(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores_of(q, k).softmax(-1) * torch.arange(1.0, SQ * SK + 1).view(SQ, SK)) @ v


def heads_mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mix = torch.ones(H, H, dtype=q.dtype).tril()
    return torch.einsum("bhij,hg->bgij", scores_of(q, k).softmax(-1), mix) @ v


def gate_of_the_other_sign(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    gate = (0.5 - torch.logsumexp(scores, -1, keepdim=True)).sigmoid()
    return scores.softmax(-1) @ v * gate


REFUSED = {
    column_not_dropped: "stays in the weights",
    other_column_dropped: "another column is dropped",
    columns_on_both_sides: "padded otherwise than by columns on one side",
    other_columns_dropped: "another column is dropped",
    more_columns_dropped: "stays in the weights",
    number_added_beside_a_sink: "a number is added to the scores but not to the sinks",
    masked_by_another_mask: "masked after the softmax by something else",
    weights_times_themselves: "multiplied by themselves",
    weights_by_their_square_root: "made of them|not understood",
    weights_filled_with_one: "filled with something other than 0",
    weights_per_pair: "not made of a mask",
    heads_mixed: "does not sum over",
}


@pytest.mark.parametrize("attend", REFUSED, ids=lambda f: f.__name__)
def test_a_near_miss_is_refused_for_its_reason(attend: object) -> None:

    report = check_like_eager(attend, tensors())
    assert report.having("rewritten", "kept") == ()
    assert any(re.search(REFUSED[attend], site.reason) for site in report.sites), report.sites  # type: ignore[index]


@pytest.mark.parametrize(
    "attend", [maximum_subtracted_beside_a_sink, gate_of_the_other_sign], ids=lambda f: f.__name__
)
def test_what_may_be_read_in_part_computes_the_same(attend: object) -> None:
    check_like_eager(attend, tensors(), differentiable=3)
