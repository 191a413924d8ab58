"""What stands between Q K^T and the softmax and has no place there, or only looks harmless. As tests/near_misses.py."""

from collections.abc import Callable

import torch
from near_misses import NearMiss, scores_of
from score_spellings import LOWEST, empty, hidden
from spellings import DV, NEG_INF, Add, B, D, H, Inputs, S, cross, draw, mha, padded, with_last
from torch import Tensor
from torch.nn import functional

SCORE_NEAR_MISSES: list[NearMiss] = []


def near_miss(inputs: Inputs, reason: str | None) -> Add:
    """Adds the function to SCORE_NEAR_MISSES."""

    def add(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        SCORE_NEAR_MISSES.append(NearMiss(attend, inputs, reason))
        return attend

    return add


# --- what is subtracted is not the largest of the row ---


@near_miss(mha, None)
def largest_of_each_key_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


@near_miss(mha, None)
def largest_of_each_key_subtracted_from_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k).masked_fill(hidden(q, k).mT, NEG_INF)
    return (scores - scores.max(-2).values.unsqueeze(-1)).softmax(-1) @ v


@near_miss(padded(mha), None)
def largest_of_other_scores_subtracted(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k)
    top = scores.masked_fill(~keep[:, None, None], NEG_INF).masked_fill(keep[:, None, None], NEG_INF)
    return (scores - top.amax(-1, keepdim=True)).softmax(-1) @ v  # minus infinity: NaN


@near_miss(mha, None)
def largest_of_all_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores - scores.amax()).softmax(-1) @ v


@near_miss(mha, None)
def mean_subtracted_from_the_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k).masked_fill(hidden(q, k), NEG_INF)
    return (scores - scores.mean(-1, keepdim=True)).softmax(-1) @ v  # NaN but for the last row


@near_miss(mha, "detach")
def scores_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).detach().softmax(-1) @ v + q + k


# --- bounds that visible keys notice ---


@near_miss(mha, "raised to at least -1")
def raised_to_a_small_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).clamp(min=-1.0).softmax(-1) @ v


@near_miss(mha, "raised to at least -50000")
def raised_to_a_weak_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.clamp(scores_of(q, k), min=-50000).softmax(-1) @ v  # HF grounding_dino


@near_miss(mha, "clamped from above")
def clamped_on_both_sides(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).clamp(-1e30, 1.0).softmax(-1) @ v


@near_miss(mha, "the larger of two tensors")
def raised_to_other_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(scores_of(q, k), scores_of(k, q)).softmax(-1) @ v


@near_miss(mha, "raised to at least -10000, which visible keys may notice")
def hidden_scores_made_numbers_that_weigh(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).masked_fill(hidden(q, k), NEG_INF).nan_to_num(neginf=-1e4).softmax(-1) @ v


@near_miss(
    with_last(cross, lambda: torch.where(torch.rand(B, 1, 5, 9) > 0.8, 0.0, NEG_INF)), "raised to at least"
)
def unknown_mask_made_numbers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (scores_of(q, k) + mask).nan_to_num().softmax(-1) @ v


@near_miss(
    with_last(cross, lambda: torch.where(torch.rand(B, 1, 5, 9) > 0.8, 0.0, NEG_INF)), "raised to at least"
)
def unknown_mask_raised_to_the_lowest_number(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (
        torch.clamp_min(scores_of(q, k) + mask, LOWEST).softmax(-1) @ v
    )  # rows without keys get no gradient


@near_miss(empty(padded(mha)), "halves the gradients")
def lowest_number_raised_to_itself(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k) + torch.where(keep[:, None, None], 0.0, LOWEST)
    return torch.max(scores, torch.tensor(LOWEST)).softmax(-1) @ v  # HF xglm


# --- fills ---


@near_miss(with_last(mha, lambda: torch.rand(B, S, S) > 0.3), "still weighs")
def bias_over_a_weak_number(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    line = torch.arange(k.shape[2], dtype=q.dtype)
    return (scores_of(q, k).masked_fill(~keep[:, None], -3.0) + line).softmax(-1) @ v


@near_miss(with_last(mha, lambda: torch.rand(B, S, S) > 0.3), "still weighs")
def weak_number_beside_the_largest(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return (scores - scores.amax(-1, keepdim=True)).masked_fill(~keep[:, None], -3.0).softmax(-1) @ v


@near_miss(with_last(mha, lambda: torch.rand(B, S, S) > 0.3), "still weighs")
def two_weak_numbers(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return scores_of(q, k).masked_fill(~keep[:, None], -3.0).masked_fill(hidden(q, k), -2.0).softmax(-1) @ v


@near_miss(with_last(mha, lambda: torch.rand(B, S, S) > 0.3), "still weighs")
def weak_number_and_infinity(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (
        scores_of(q, k).masked_fill(~keep[:, None], -3.0).masked_fill(hidden(q, k), NEG_INF).softmax(-1) @ v
    )


@near_miss(with_last(mha, lambda: torch.rand(B, S, S) > 0.3), "still weighs|raised to at least")
def weak_number_raised(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return scores_of(q, k).masked_fill(~keep[:, None], -3.0).clamp(min=-1.0).softmax(-1) @ v


@near_miss(with_last(mha, lambda: torch.rand(B, S, S) > 0.3), "which weighs, lose their weights")
def weak_number_masked_again(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    weights = scores_of(q, k).masked_fill(~keep[:, None], -3.0).softmax(-1)
    return weights.masked_fill(~keep[:, None], 0.0) @ v


@near_miss(padded(with_last(mha, lambda: torch.tensor(NEG_INF))), "whose value is not known")
def unknown_number_filled_in(q: Tensor, k: Tensor, v: Tensor, fill: Tensor, keep: Tensor) -> Tensor:
    return scores_of(q, k).masked_fill(~keep[:, None, None], fill).softmax(-1) @ v


@near_miss(padded(with_last(mha, lambda: torch.rand(1, 1, S, S) > 0.5)), "mix several fill values")
def unknown_mask_under_another(q: Tensor, k: Tensor, v: Tensor, buffer: Tensor, keep: Tensor) -> Tensor:
    scores = torch.where(buffer, scores_of(q, k), torch.full([], LOWEST))
    return (scores + torch.where(keep[:, None, None], 0.0, LOWEST)).softmax(-1) @ v


@near_miss(empty(padded(mha)), "get other gradients")
def two_lowest_numbers_added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k) + torch.where(hidden(q, k), LOWEST, 0.0)
    return (scores + torch.where(keep[:, None, None], 0.0, LOWEST)).softmax(-1) @ v


# --- scales ---


@near_miss(padded(with_last(mha, lambda: -torch.rand(H, 1, 1))), "inside a scale that is a tensor")
def mask_inside_a_scale_of_unknown_sign(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, keep: Tensor
) -> Tensor:
    return (scores_of(q, k).masked_fill(~keep[:, None, None], NEG_INF) * scale).softmax(-1) @ v


@near_miss(padded(with_last(mha, lambda: -torch.rand(H, 1, 1))), None)
def added_mask_inside_a_scale_of_unknown_sign(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, keep: Tensor
) -> Tensor:
    return ((scores_of(q, k) + torch.where(keep[:, None, None], 0.0, -1e9)) * scale).softmax(-1) @ v


@near_miss(with_last(mha, lambda: torch.rand(2, 1, 1, 1, 1)), None)
def scale_that_adds_a_dimension(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return (scores_of(q, k) * scale).softmax(-1) @ v


# --- products that are none of queries and keys ---


@near_miss(lambda: (draw(B, S, D), draw(5, D), draw(B, S, 5, DV)), "")
def router_by_linear(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    return torch.einsum("bse,bsed->bsd", functional.linear(x, router).softmax(-1), experts)


@near_miss(lambda: (draw(B, S, D), draw(D)), "not understood")
def pooling_by_a_vector(x: Tensor, vector: Tensor) -> Tensor:
    return (torch.tanh(x) @ vector).softmax(-1)[:, None] @ x


@near_miss(mha, "does not pair")
def products_of_the_same(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q.unsqueeze(-2) * k.unsqueeze(-3)).sum((-1, -2))[..., None] * scores_of(q, k).sin()).softmax(
        -1
    ) @ v
