"""Attention of recommenders, time series and speech: scores of several products, rows that are switched off afterwards."""

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


def near_miss(inputs: Inputs, reason: str | None = None) -> Add:
    """Adds the function to BESIDE_NEAR_MISSES."""

    def add(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        BESIDE_NEAR_MISSES.append(NearMiss(attend, inputs, reason))
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


# --- near misses ---


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
