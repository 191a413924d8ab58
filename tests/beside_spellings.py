"""Attention of recommenders, time series and speech: scores of several products, rows switched off afterwards."""

from collections.abc import Callable

import torch
from near_misses import NearMiss
from spellings import (
    DV,
    NEG_INF,
    SK,
    SQ,
    Add,
    B,
    D,
    H,
    Inputs,
    S,
    Spelling,
    collect,
    cross,
    draw,
    single,
    with_last,
)
from torch import Tensor
from torch.nn import functional

BESIDE: list[Spelling] = []
spelling = collect(BESIDE)
BESIDE_NEAR_MISSES: list[NearMiss] = []


#: Those through which eager cannot differentiate.
IN_PLACE_NEAR_MISSES: list[NearMiss] = []


def near_miss(
    inputs: Inputs, reason: str | None = None, *, found: list[NearMiss] = BESIDE_NEAR_MISSES
) -> Add:
    """Adds the function to a list of near misses."""

    def add(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        found.append(NearMiss(attend, inputs, reason))
        return attend

    return add


def intervals() -> tuple[Tensor, ...]:
    """q, k, v (B, S, .), and a key for each pair of positions (B, S, S, D)."""
    return (*single(), draw(B, S, S, D))


def pairs() -> tuple[Tensor, ...]:
    """q, k, v (B, S, .), and a number for each pair of positions."""
    return (*single(), draw(B, S, S))


def counted(make: Inputs) -> Inputs:
    """With a weight (B, Sq) of each query, some of them 0."""
    return with_last(make, lambda: torch.tensor([[1.0, 1, 1, 1, 1], [1, 0.5, 0, 0, 0], [0, 1, 1, 2, 1]]))


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1)


# --- queries meet keys, and a tensor of all pairs ---


@spelling(intervals, scale=0.25, mask="causal", biases=1, differentiable=4)
def keys_of_all_pairs_in_place(q: Tensor, k: Tensor, v: Tensor, times: Tensor) -> Tensor:
    scores = q.matmul(k.transpose(1, 2))  # pmixer/TiSASRec.pytorch model.py
    scores += times.matmul(q.unsqueeze(-1)).squeeze(-1)
    hidden = ~torch.tril(torch.ones(q.shape[1], q.shape[1], dtype=torch.bool))
    filler = torch.ones(scores.shape) * (-(2**32) + 1)
    scores = torch.where(hidden, filler.to(scores.dtype), scores / 4)
    return functional.softmax(scores, dim=-1).matmul(v)


@spelling(intervals, scale=0.25, biases=1, differentiable=4)
def keys_of_all_pairs_first(q: Tensor, k: Tensor, v: Tensor, times: Tensor) -> Tensor:
    scores = torch.einsum("bijd,bid->bij", times, q) + torch.einsum("bid,bjd->bij", q, k)
    return (scores * 0.25).softmax(-1) @ v


# --- queries that are switched off after the softmax ---


@spelling(counted(cross), scale=0.25, differentiable=4)
def queries_repeated_along_the_keys(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    each = rows[:, None, :, None].repeat(1, H, 1, k.shape[2])  # kang205/SASRec modules.py, in PyTorch
    return (weights(q, k) * each) @ v


@spelling(counted(cross), scale=0.25, differentiable=4)
def queries_tiled_along_the_keys(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    return (weights(q, k) * rows[:, None, :, None].tile(SK)) @ v


@spelling(counted(cross), scale=0.25, differentiable=3)
def queries_kept_as_numbers(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    kept = rows.ne(0)[:, None, :, None].expand(-1, H, -1, k.shape[2]).float()
    return (weights(q, k) * kept) @ v


@spelling(counted(cross), scale=0.25, differentiable=3)
def queries_filled_along_the_keys(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    gone = rows.eq(0)[:, None, :, None].expand(-1, H, -1, k.shape[2])
    return weights(q, k).masked_fill(gone, 0.0) @ v


@spelling(
    lambda: (draw(H * B, SQ, D), draw(H * B, SK, D), draw(H * B, SK, DV), draw(B, SQ)),
    scale=0.25,
    differentiable=4,
)
def queries_repeated_for_each_head(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    each = rows.unsqueeze(-1).repeat(1, 1, SK).repeat(H, 1, 1)  # soobinseo/Transformer-TTS module.py
    return torch.bmm(weights(q, k) * each, v)


# --- a large number that no type holds exactly, made in two ways ---


@spelling(
    with_last(single, lambda: torch.arange(S) >= torch.tensor([S, 5, 6])[:, None]),
    scale=0.25,
    mask="causal & padding",
    empty_row="absorbed",
)
def the_lower_of_two_masks(q: Tensor, k: Tensor, v: Tensor, gone: Tensor) -> Tensor:
    large, n = torch.finfo(torch.float32).min * 0.7, q.shape[1]  # google-research/timesfm
    causal = torch.triu(torch.ones(n, n, dtype=q.dtype) * large, diagonal=1)
    mask = torch.minimum(gone.to(q.dtype)[:, None] * large, causal)
    return (q @ k.mT * 0.25 + mask).softmax(-1) @ v


# --- weights changed in place; without gradients, which eager refuses where exp or softmax is written over ---


def ones_above(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).triu(1)


@spelling(single, scale=0.25, mask="causal", differentiable=0)
def weights_filled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = ones_above(q.shape[1])
    found = (q @ k.mT * 0.25).masked_fill(hidden, NEG_INF).softmax(-1)
    found.masked_fill_(hidden, 0.0)
    return found @ v


@spelling(counted(cross), scale=0.25, differentiable=0)
def weights_multiplied_in_place(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    found = weights(q, k)
    found *= rows[:, None, :, None]
    found /= 2
    return found @ v


@spelling(cross, scale=0.25, differentiable=0)
def sum_divided_by_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25
    found = (scores - scores.amax(-1, keepdim=True)).exp()
    found /= found.sum(-1, keepdim=True)
    return found @ v


@spelling(cross, scale=0.25, differentiable=0)
def exp_and_division_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25
    found = (scores - scores.amax(-1, keepdim=True)).exp_()
    out = found @ v
    out /= found.sum(-1, keepdim=True)
    return out


# --- near misses ---


@near_miss(cross, "written to in place", found=IN_PLACE_NEAR_MISSES)
def weights_read_before_they_are_changed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = weights(q, k)
    out = found @ v
    found *= 0.5
    return out + found @ v


@near_miss(cross, "written to in place", found=IN_PLACE_NEAR_MISSES)
def weights_changed_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = weights(q, k)
    found.view(-1)[:2] = 0.3
    found *= 0.5
    return found @ v


@near_miss(cross, "not understood", found=IN_PLACE_NEAR_MISSES)
def weights_multiplied_onto_a_tensor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = q.sum(-1, keepdim=True).expand(B, H, SQ, SK).contiguous()
    rows *= weights(q, k)
    return rows @ v


@near_miss(cross, "something other than its sum", found=IN_PLACE_NEAR_MISSES)
def sum_changed_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = (q @ k.mT * 0.25).exp()
    total = found.sum(-1, keepdim=True)
    total *= 1.5
    found /= total
    return found @ v


@near_miss(cross, "written to in place", found=IN_PLACE_NEAR_MISSES)
def exp_changed_after_its_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = (q @ k.mT * 0.25).exp()
    total = found.sum(-1, keepdim=True)
    found[..., 0] = 0.0
    found /= total
    return found @ v


@near_miss(cross, found=IN_PLACE_NEAR_MISSES)
def divided_by_its_sum_twice(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = (q @ k.mT * 0.25).exp()
    total = found.sum(-1, keepdim=True)
    found /= total
    found /= total
    return found @ v


@near_miss(pairs, "written to in place")
def scores_added_onto_a_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    bias = bias.cos()
    bias += q @ k.mT
    return bias.softmax(-1) @ v


@near_miss(pairs, "written to in place")
def scores_subtracted_from_a_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return bias.cos().sub_(q @ k.mT).softmax(-1) @ v


@near_miss(pairs, "written to in place")
def product_added_onto_a_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = bias.cos()
    scores.baddbmm_(q, k.mT, alpha=0.25)
    return scores.softmax(-1) @ v


@near_miss(pairs, "written to in place")
def scores_added_onto_a_bias_that_is_read_again(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = bias.cos().add_(q @ k.mT)
    return scores.masked_fill(scores.detach() > 3, NEG_INF).softmax(-1) @ v


@near_miss(counted(cross), "along the keys")
def repeated_queries_with_one_pair_changed(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    each = rows[:, None, :, None].repeat(1, H, 1, SK)
    each[..., 0] = 0.5
    return (weights(q, k) * each) @ v


@near_miss(counted(cross), "along the keys")
def kept_queries_with_one_pair_changed(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    kept = rows.ne(0)[:, None, :, None].repeat(1, H, 1, SK)
    kept[..., 0] = False
    return (weights(q, k) * kept.to(q.dtype)) @ v


@near_miss(counted(cross))
def repeated_queries_changed_before_the_copy(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    rows = rows.clone()
    each = rows[:, None, :, None].expand(B, H, SQ, SK)
    rows.add_(1.0)
    return (weights(q, k) * each) @ v


@near_miss(counted(cross), "along the keys")
def repeated_queries_summed_along_the_keys(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    return (weights(q, k) * rows[:, None, :, None].repeat(1, H, 1, SK).cumsum(-1)) @ v


@near_miss(with_last(single, lambda: draw(B, S)))
def keys_tiled_along_the_queries(q: Tensor, k: Tensor, v: Tensor, columns: Tensor) -> Tensor:
    return (weights(q, k) * columns[:, None].tile(1, S, 1)) @ v


@near_miss(with_last(single, lambda: draw(B, S)))
def queries_tiled_as_if_they_were_keys(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    return (weights(q, k) * rows.tile(1, S).view(B, S, S)) @ v
