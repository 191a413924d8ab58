"""Attention to a single key: its weight is 1 whatever the score, and the gradients of the scores are exactly 0."""

import pytest
import torch
from compiling import check_like_eager, compiled
from graphs import site_of
from torch import Tensor
from torch.nn import functional

from attnopt.spec import EmptyRow

B, H, S, D = 2, 4, 5, 16
NEG_INF = float("-inf")


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1) @ v


def heads_last(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bhid,bhjd->bhij", q / 4, k).softmax(-1)
    return torch.einsum("bhij,bhjd->bihd", weights, v)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.bmm(q * 0.25, k.transpose(1, 2)).softmax(-1), v).unflatten(0, (B, H))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True) @ v


def by_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def by_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).log_softmax(-1).exp() @ v


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores_of(q, k) + q[..., :1]).softmax(-1) @ v


def times_a_gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores_of(q, k).softmax(-1) * q[..., :1]) @ v


def called(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


SPELLINGS = (
    plain, heads_last, folded, by_hand, by_logsumexp, by_log_softmax, biased, times_a_gate, called,
)  # fmt: skip


def tensors(queries: int = S) -> tuple[Tensor, ...]:
    return torch.randn(B, H, queries, D), torch.randn(B, H, 1, D), torch.randn(B, H, 1, D)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("attend", SPELLINGS, ids=lambda f: f.__name__)
def test_a_single_key_is_kept_as_it_is(attend, dynamic):
    report = check_like_eager(attend, tensors(), differentiable=3, dynamic=dynamic)
    (site,) = report.attention
    assert site.verdict == "kept", site.reason
    assert attend is called or "there is a single key" in site.reason
    assert site.spec == f"softmax scale={1 if attend is called and dynamic else 0.25} full"


def test_a_single_query_of_a_single_key_is_kept():
    (site,) = check_like_eager(plain, tensors(1), differentiable=3).attention
    assert (site.verdict, site.spec) == ("kept", "softmax scale=0.25 full")


def test_grouped_heads_of_a_single_key_are_told():
    def attend(q, k, v):
        k, v = (x[:, :2].repeat_interleave(2, 1) for x in (k, v))
        return scores_of(q, k).softmax(-1) @ v

    assert site_of(attend, *tensors()).spec.heads.share == 2


def test_a_mask_of_a_single_key_may_leave_rows_empty():
    def attend(q, k, v):
        return scores_of(q, k).masked_fill(v[:, :1, :, 0, None] > 0, NEG_INF).softmax(-1) @ v

    (site,) = check_like_eager(attend, tensors(), differentiable=3).attention
    assert site.verdict == "kept"
    assert site_of(attend, *tensors()).spec.empty_row is EmptyRow.NAN


@pytest.mark.parametrize("first", [False, True])
def test_a_single_key_beside_a_sink_is_rewritten(first):
    def attend(q, k, v):
        column = v[:, :, :1, :1].expand(B, H, S, 1)
        parts = [column, scores_of(q, k)] if first else [scores_of(q, k), column]
        weights = torch.cat(parts, -1).softmax(-1)
        return (weights[..., 1:] if first else weights[..., :-1]) @ v

    (site,) = check_like_eager(attend, tensors(), differentiable=3).attention
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=0.25 full sink logits per query")


# --- near misses ---


def over_a_single_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(1) @ v


def over_a_single_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def weighing_many_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("bhij,bhjd->bhid", (q @ k[:, :, :1].mT).softmax(-1), v)


@pytest.mark.parametrize(
    ("attend", "heads", "queries"),
    [(over_a_single_head, 1, S), (over_a_single_query, H, 1), (weighing_many_values, H, S)],
)
def test_a_softmax_over_another_single_element_is_left_alone(attend, heads, queries):
    inputs = (torch.randn(B, heads, queries, D), torch.randn(B, heads, 7, D), torch.randn(B, heads, 7, D))
    report = check_like_eager(attend, inputs, differentiable=3)
    assert report.having("rewritten", "kept") == ()


def test_a_key_that_becomes_several_is_compiled_again():
    run = compiled(plain, dynamic=True)
    for keys in (1, 3):
        q, k, v = torch.randn(B, H, S, D), torch.randn(B, H, keys, D), torch.randn(B, H, keys, D)
        torch.testing.assert_close(run(q, k, v), plain(q, k, v))
