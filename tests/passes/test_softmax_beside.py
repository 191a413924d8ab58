"""What stands beside a softmax and is told otherwise: several sinks, factors of the keys after it, equal fills."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor
from torch.nn import functional

B, H, SQ, SK, D = 2, 4, 5, 9, 16
NEG_INF = float("-inf")
LOWEST = torch.finfo(torch.float32).min


def tensors() -> tuple[Tensor, ...]:
    """q, k, v, a number for each key, and what may be seen of the keys."""
    q, k, v = torch.randn(B, H, SQ, D), torch.randn(B, H, SK, D), torch.randn(B, H, SK, D)
    return q, k, v, torch.randn(B, SK), torch.rand(B, SK) < 0.7


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


def upper(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)


def spec_of(attend, **options) -> str:
    """The spec of the one site, which was rewritten and computes what eager computes."""
    (site,) = check_like_eager(attend, tensors(), differentiable=4, **options).attention
    assert site.verdict == "rewritten", site.reason
    assert site.error is not None
    return site.spec


# --- several sinks ---


def zeros_behind(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    return functional.pad(scores_of(q, k), (0, 3)).softmax(-1)[..., :-3] @ v


def numbers_in_front(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    return functional.pad(scores_of(q, k), (2, 0), value=0.5).softmax(-1)[..., 2:] @ v


def two_of_each_head(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    sinks = v[:1, :, :1, :2].expand(B, H, q.shape[2], 2)
    return torch.cat([scores_of(q, k), sinks], -1).softmax(-1)[..., :-2] @ v


def two_of_each_query(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    return torch.cat([q[..., :2], scores_of(q, k)], -1).softmax(-1)[..., 2:] @ v


SINKS = (zeros_behind, numbers_in_front, two_of_each_head, two_of_each_query)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("attend", SINKS, ids=lambda f: f.__name__)
def test_several_sinks_are_one(attend, dynamic):
    per_query = " per query" if attend in (two_of_each_query, two_of_each_head) else ""
    assert spec_of(attend, dynamic=dynamic) == f"softmax scale=0.25 full sink logits{per_query}"


# --- what the weights of a key are multiplied by, its value may be multiplied by as well ---


def gated_by_key(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    return (scores_of(q, k).softmax(-1) * by_key[:, None, None].sigmoid()) @ v


def divided_by_key(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    return (scores_of(q, k).softmax(-1) / by_key[:, None, None].exp()) @ v


def masked_by_key(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    return (scores_of(q, k).softmax(-1) * keep[:, None, None]) @ v


def masked_as_number(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    return (scores_of(q, k).softmax(-1) * keep[:, None, None].to(q.dtype) * 2) @ v


BY_KEY = (gated_by_key, divided_by_key, masked_by_key, masked_as_number)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("attend", BY_KEY, ids=lambda f: f.__name__)
def test_weights_are_multiplied_by_key(attend, dynamic):
    assert spec_of(attend, dynamic=dynamic) == "softmax scale=0.25 full"


def test_a_factor_of_each_query_head_is_none_of_the_shared_values():
    def attend(q, k, v, by_key, keep):
        k, v = (x[:, :1].expand(B, H, SK, D) for x in (k, v))
        return (
            scores_of(q, k).softmax(-1) * k.mT[:, :, :1] * q[:, :, :1, :1] * v.new_ones(H, 1, SK).cumsum(0)
        ) @ v

    report = check_like_eager(attend, tensors())
    (site,) = report.attention
    assert (site.verdict, "not made of a mask" in site.reason) == ("refused", True), site.reason


# --- one fill after the other ---


def filled_twice(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k).masked_fill(~keep[:, None, None], LOWEST)
    return scores.masked_fill(upper(scores), LOWEST).softmax(-1) @ v


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_fills_with_one_number_are_one_fill(dynamic):
    assert spec_of(filled_twice, dynamic=dynamic) == "softmax scale=0.25 causal & padding empty=uniform"


def test_a_bias_between_equal_fills_is_seen_in_empty_rows():
    def attend(q, k, v, by_key, keep):
        scores = scores_of(q, k).masked_fill(~keep[:, None, None], -1e9) + by_key[:, None, None] * 1e8
        return scores.masked_fill(upper(scores), -1e9).softmax(-1) @ v

    report = check_like_eager(attend, tensors())
    assert report.having("rewritten") == ()
    assert "would mix several fill values" in report.attention[0].reason


# --- numbers, writes and sums in one operation ---


def made_numbers(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return scores.masked_fill(upper(scores), NEG_INF).nan_to_num().softmax(-1) @ v


def padding_made_numbers(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    return scores_of(q, k).masked_fill(~keep[:, None, None], NEG_INF).nan_to_num(neginf=-1e9).softmax(-1) @ v


def written_by_mask(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores[:, :, upper(scores)] = NEG_INF
    return scores.softmax(-1) @ v


def scaled_onto_a_bias(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    return torch.addcmul(by_key[:, None, None], q @ k.mT, torch.tensor(0.25)).softmax(-1) @ v


WRITTEN = {
    made_numbers: "causal",
    padding_made_numbers: "padding empty=uniform",
    written_by_mask: "causal",
    scaled_onto_a_bias: "full bias",
}


@pytest.mark.parametrize("attend", WRITTEN, ids=lambda f: f.__name__)
def test_one_operation_that_does_several_things_is_read(attend):
    assert spec_of(attend) == f"softmax scale=0.25 {WRITTEN[attend]}"


@pytest.mark.parametrize("attend", [made_numbers, padding_made_numbers], ids=lambda f: f.__name__)
def test_scores_are_made_numbers_with_symbolic_sizes(attend):
    assert spec_of(attend, dynamic=True) == f"softmax scale=0.25 {WRITTEN[attend]}"


def test_a_mask_that_is_written_by_index_is_an_operand():
    def attend(q, k, v, by_key, keep):
        seen = torch.ones(SQ, SK, dtype=torch.bool)
        seen[:, torch.tensor([3, 4])] = False
        return scores_of(q, k).masked_fill(~seen, NEG_INF).softmax(-1) @ v

    assert spec_of(attend) == "softmax scale=0.25 opaque empty=nan"


def at_places(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores[:, :, :, torch.tensor([3, 4])] = NEG_INF
    return scores.softmax(-1) @ v


def added_by_mask(q: Tensor, k: Tensor, v: Tensor, by_key: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k)
    hidden = torch.broadcast_to(upper(scores), scores.shape)
    return scores.index_put((hidden,), scores.new_tensor(NEG_INF), accumulate=True).softmax(-1) @ v


@pytest.mark.parametrize("attend", [at_places, added_by_mask], ids=lambda f: f.__name__)
def test_other_writes_to_the_scores_are_left_alone(attend):
    report = check_like_eager(attend, tensors(), differentiable=3)
    assert report.having("rewritten") == ()
    assert "no mask of queries and keys" in report.attention[0].reason
