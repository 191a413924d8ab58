"""What looks like softmax attention and is not, or not only: each must be left alone, for the stated reason."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from spellings import (
    DV,
    HKV,
    NEG_INF,
    SK,
    SQ,
    B,
    D,
    H,
    Inputs,
    S,
    cross,
    draw,
    gqa,
    mha,
    padded,
    single,
    with_last,
)
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class NearMiss:
    """reason: part of what the report says; None where there is nothing that a reader would stop at."""

    attend: Callable[..., Any]
    inputs: Inputs
    reason: str | None

    @property
    def name(self) -> str:
        return self.attend.__name__


NEAR_MISSES: list[NearMiss] = []


def near_miss(inputs: Inputs, reason: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the function to NEAR_MISSES."""

    def add(attend: Callable[..., Any]) -> Callable[..., Any]:
        NEAR_MISSES.append(NearMiss(attend, inputs, reason))
        return attend

    return add


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


# --- the weights are needed for something else ---


@near_miss(mha, None)
def weights_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores_of(q, k).softmax(-1)
    return weights @ v, weights  # codertimo/BERT-pytorch


@near_miss(mha, None)
def scores_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = scores_of(q, k)
    return scores.softmax(-1) @ v, scores  # openai/whisper


@near_miss(mha, None)
def weights_summed_for_a_loss(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    weights = scores_of(q, k).softmax(-1)
    return weights @ v, (weights * weights.log()).sum()


@near_miss(mha, None)
def scores_used_by_another_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return scores.softmax(-1) @ v + scores.mul(2).softmax(-1) @ v


@near_miss(mha, None)
def scores_masked_in_place_and_used_by_their_first_name(
    q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    scores = scores_of(q, k)
    weights = scores.div_(2.0).masked_fill_(torch.ones(S, S, dtype=torch.bool).triu_(1), NEG_INF).softmax(-1)
    return weights @ v, scores * 2


@near_miss(mha, "multiplied by itself")
def weights_times_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    return (weights @ weights) + v.sum()


# --- something that is trained has no effect ---


@near_miss(lambda: (*mha(), draw(H)), None)
def sinks_in_the_maximum_alone(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = scores_of(q, k)
    top = torch.maximum(scores.amax(-1, keepdim=True), sinks[:, None, None])
    weights = (scores - top).exp()  # fla ops/attn/naive.py without the sinks in the sum
    return weights / weights.sum(-1, keepdim=True) @ v


# --- something stands between the scores and the softmax ---


@near_miss(lambda: (*mha(), draw(H, H)), "copied along")
def talking_heads_before(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
    return torch.einsum("bhij,hg->bgij", scores_of(q, k), mix).softmax(-1) @ v


@near_miss(lambda: (*mha(), draw(H, H)), "does not sum over what the softmax normalised")
def talking_heads_after(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
    return torch.einsum("bhij,hg->bgij", scores_of(q, k).softmax(-1), mix) @ v


@near_miss(mha, None)
def keys_chosen_by_their_score(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    least = scores.topk(3, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < least, NEG_INF).softmax(-1) @ v


@near_miss(mha, "pow|not understood")
def scores_squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (scores_of(q, k) ** 2).softmax(-1) @ v


@near_miss(mha, "varies along the keys")
def scores_times_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores * scores).softmax(-1) @ v


@near_miss(mha, "relu")
def scores_rectified(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).relu().softmax(-1) @ v


@near_miss(mha, "exp")
def exponential_of_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).exp().softmax(-1) @ v


@near_miss(mha, "tanh on scores that is not a soft cap")
def tanh_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (3 * torch.tanh(5 * torch.tanh(scores_of(q, k) / 5))).softmax(-1) @ v


@near_miss(mha, "inside a soft cap")
def constant_inside_the_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (5 * torch.tanh((scores_of(q, k) + 1) / 5)).softmax(-1) @ v


@near_miss(mha, "inside a soft cap")
def mask_inside_the_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (5 * torch.tanh(scores_of(q, k).masked_fill(hidden, -1e9) / 5)).softmax(-1) @ v


@near_miss(with_last(mha, lambda: torch.rand(S, S)), "varies along the keys")
def scale_per_key(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    return (scores_of(q, k) * factor).softmax(-1) @ v


@near_miss(mha, "varies along the keys|not understood|no product of")
def decay_onto_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    return (scores_of(q, k) * 0.9 ** (i - j).abs()).softmax(-1) @ v


@near_miss(mha, "floor|rounding")
def scores_divided_with_rounding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.div(q @ k.mT, 4, rounding_mode="floor").softmax(-1) @ v


@near_miss(mha, "not floating point")
def scores_rounded_to_integers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).to(torch.int32).float().softmax(-1).to(v.dtype) @ v


@near_miss(
    lambda: (torch.randint(-3, 4, (B, H, S, D)), torch.randint(-3, 4, (B, H, S, D)), draw(B, H, S, D)),
    "torch.int64",
)
def integer_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -1, dtype=v.dtype) @ v


@near_miss(mha, "divided by zero")
def scores_over_zero(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / 0).softmax(-1) @ v


@near_miss(mha, "scaled by")
def scores_times_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * float("inf")).softmax(-1) @ v


# --- masks that are no masks ---


@near_miss(padded(mha), None)
def fill_taken_back(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (scores_of(q, k) - 1e9).masked_fill(~keep[:, None, None], -1e9).softmax(-1) @ v


@near_miss(padded(mha), "masked after the softmax by something else")
def mask_after_the_softmax(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1).masked_fill(~keep[:, None, None], 0.0) @ v


@near_miss(padded(mha), "masked after the softmax by something else")
def mask_onto_the_weights(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (scores_of(q, k).softmax(-1) * (keep[:, None, None] & keep[:, None, :, None])) @ v


@near_miss(padded(mha), None)
def mask_onto_the_scores(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (scores_of(q, k) * keep[:, None, None]).softmax(-1) @ v


@near_miss(with_last(mha, lambda: draw(B, H, S, S)), "between two tensors|where")
def chosen_between_two_scores(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    return torch.where(hidden, scores_of(q, k), other).softmax(-1) @ v


@near_miss(padded(mha), "mix several fill values|still weighs")
def two_finite_fills(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k).masked_fill(~keep[:, None, None], -2e9)
    return scores.masked_fill(keep.logical_not()[:, None, :, None], -1e9).softmax(-1) @ v


@near_miss(padded(with_last(mha, lambda: draw(B, H, S, S))), "mix several fill values")
def bias_onto_filled_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    return (scores_of(q, k).masked_fill(~keep[:, None, None], -1e9) + bias).softmax(-1) @ v


# --- the wrong dimension ---


@near_miss(mha, "does not sum over|does not pair|over a single")
def softmax_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-2) @ v


@near_miss(mha, "does not sum over|does not pair")
def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(1) @ v


@near_miss(mha, None)
def channels_that_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """XCiT's scores are D x D: it may be read as attention whose positions are channels, and must be right then."""
    q, k, v = (functional.normalize(x, dim=-2).mT for x in (q, k, v))
    return ((q @ k.mT) * 2.0).softmax(-1) @ v


@near_miss(mha, None)
def features_softmaxed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Linear attention with a softmax as its feature map."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


@near_miss(lambda: (draw(B, S, D), draw(D, 8), draw(8, D, DV)), "")
def mixture_of_experts(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    gates = torch.softmax(x @ router, dim=-1)
    return torch.einsum("bse,bsed->bsd", gates, torch.einsum("bsd,edf->bsef", x, experts))


@near_miss(lambda: (draw(B, S, D), draw(D, 5)), None)
def classifier(x: Tensor, weight: Tensor) -> Tensor:
    return torch.softmax(x @ weight, dim=-1)


@near_miss(lambda: (draw(B, S, D), draw(D)), None)
def pooling_by_a_learned_query(x: Tensor, query: Tensor) -> Tensor:
    weights = torch.softmax((x @ query) * 0.25, dim=-1)
    return torch.einsum("bs,bsd->bd", weights, x)


@near_miss(lambda: (draw(B, S, D), draw(D, D), draw(D)), "not understood|tanh|no product")
def additive_attention(x: Tensor, weight: Tensor, vector: Tensor) -> Tensor:
    energy = torch.tanh(x[:, :, None] + (x @ weight)[:, None]) @ vector  # Bahdanau
    return energy.softmax(-1) @ x


@near_miss(lambda: (draw(B, SQ, D), draw(B, SK, D), draw(B, SK, D)), "not understood|no product")
def distances_softmaxed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (-torch.cdist(q, k)).softmax(-1) @ v


# --- dropout ---


@near_miss(mha, None)
def dropout_in_training(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.dropout(scores_of(q, k).softmax(-1), p=0.5, training=True).mul(0) @ v


@near_miss(mha, "dropout 1")
def sdpa_with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, dropout_p=1.0)


# --- writes in place ---


@near_miss(mha, "written to in place")
def queries_changed_after_their_use(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.cos()
    scores = scores_of(q, k)
    q.mul_(2)
    return scores.softmax(-1) @ v + q


@near_miss(mha, None)
def values_changed_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    v = v * 1
    first = v[:, :, 0]
    weights = scores_of(q, k).softmax(-1)
    first.zero_()
    return weights @ v


@near_miss(with_last(mha, lambda: torch.rand(H, 1, 1)), "written to in place")
def scale_changed_in_between(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
    temperature = temperature * 1
    scores = q @ k.mT * temperature
    temperature.mul_(3)
    return scores.softmax(-1) @ v + temperature


@near_miss(mha, "is written to in place")
def scores_changed_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    scores[..., 0] = -5.0
    return scores.softmax(-1) @ v


@near_miss(mha, "is written to in place")
def weights_changed_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    weights[..., 0] = 0.0
    return weights @ v


@near_miss(mha, "between the softmax and the values")
def weights_shifted_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    weights.add_(2)
    return weights @ v


@near_miss(mha, "made of them|not understood")
def weights_renormalised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).softmax(-1)
    return (weights / (1e-6 + weights.sum(-2, keepdim=True))) @ v  # slot attention


@near_miss(padded(mha), "divided by data")
def weights_over_a_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    keep = keep[:, None, None]
    return (scores_of(q, k).masked_fill(~keep, -torch.inf).softmax(-1) / keep) @ v  # 0 / 0 in every row


@near_miss(mha, "also adds something")
def product_with_values_adds(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.baddbmm(v, scores_of(q, k).softmax(-1), v)


@near_miss(cross, "")
def keys_of_another_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k)[..., 1:].softmax(-1) @ v[:, :, 1:]


@near_miss(gqa, None)
def two_heads_mixed_up(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys are repeated, values tiled: another pairing of heads, which no grouping states."""
    k, v = k.repeat_interleave(H // HKV, dim=1), v.repeat(1, H // HKV, 1, 1)
    return scores_of(q, k).softmax(-1) @ v


@near_miss(single, "")
def weights_cut(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1)[..., :-1] @ v[:, :-1]
