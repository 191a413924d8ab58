"""What real code puts between Q K^T and the softmax: functions to read, and what they mean; see tests/spellings.py."""

import math

import torch
from spellings import (
    DV,
    NEG_INF,
    SK,
    SQ,
    B,
    D,
    H,
    Inputs,
    S,
    Spelling,
    by_position,
    collect,
    cross,
    draw,
    gqa,
    mha,
    padded,
    repeat_kv,
    single,
    upper,
    with_last,
)
from torch import Tensor
from torch.nn import functional

SCORE_SPELLINGS: list[Spelling] = []
spelling = collect(SCORE_SPELLINGS)
LOWEST = torch.finfo(torch.float32).min


def hidden(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)


def empty(make: Inputs) -> Inputs:
    """The last of the inputs, which keeps keys, keeps none in one row of the batch."""

    def inputs() -> tuple[Tensor, ...]:
        *others, keep = make()
        keep[0] = False
        return *others, keep

    return inputs


# --- numbers and rows that a softmax takes no notice of ---


@spelling(mha, scale=-0.25)
def number_minus_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (1.0 - q @ k.mT * 0.25).softmax(-1) @ v


@spelling(mha, scale=-0.25)
def number_minus_twice_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.rsub(q @ k.mT * 0.125, 3.0, alpha=2).softmax(-1) @ v


@spelling(with_last(cross, lambda: draw(H, SQ, SK)), scale=-0.25, biases=1, differentiable=4)
def bias_minus_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (bias - q @ k.mT / 4).softmax(-1) @ v


@spelling(with_last(cross, lambda: draw(H, SQ, SK)), scale=0.25, biases=1, differentiable=4)
def bias_subtracted_three_times(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return torch.sub(q @ k.mT / 4, bias, alpha=3).softmax(-1) @ v


@spelling(mha, scale=0.25)
def largest_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25
    return (scores - scores.amax(dim=-1, keepdim=True)).softmax(-1) @ v


@spelling(mha, scale=0.25)
def largest_subtracted_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25
    return (scores - scores.max(dim=-1, keepdim=True)[0].detach()).softmax(-1) @ v


@spelling(mha, scale=0.25, mask="causal")
def largest_of_the_masked_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.25).masked_fill(hidden(q, k), NEG_INF)
    return (scores - scores.max(-1).values.unsqueeze(-1)).softmax(-1) @ v


@spelling(padded(mha), scale=0.25, mask="padding", empty_row="nan")
def largest_subtracted_where_a_row_may_be_empty(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.25).masked_fill(~keep[:, None, None], NEG_INF)
    return (scores - scores.detach().amax(-1, keepdim=True)).softmax(-1) @ v


@spelling(with_last(cross, lambda: draw(H, SQ, 1)), scale=0.25, biases=1, differentiable=4)
def any_number_added_to_a_row(q: Tensor, k: Tensor, v: Tensor, row: Tensor) -> Tensor:
    return (q @ k.mT / 4 + row).softmax(-1) @ v  # may be infinite


# --- lower bounds, and fills that are tensors ---


@spelling(mha, scale=0.25, mask="causal")
def raised_to_the_lowest_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25 + upper(q.shape[2], LOWEST, q.dtype)
    return torch.max(scores, torch.tensor(torch.finfo(scores.dtype).min)).softmax(-1) @ v  # HF opt


@spelling(padded(cross), scale=0.25, mask="padding", empty_row="uniform")
def raised_after_minus_infinity(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.25).masked_fill(~keep[:, None, None], NEG_INF)
    return scores.clamp(min=LOWEST).softmax(-1) @ v


@spelling(padded(cross), scale=0.25, mask="padding", empty_row="uniform")
def fill_is_a_whole_tensor(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25
    return torch.where(keep[:, None, None], scores, -9e15 * torch.ones_like(scores)).softmax(-1) @ v  # GAT


@spelling(mha, scale=0.25, mask="causal")
def fill_is_full_like(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25
    return torch.where(hidden(q, k), torch.full_like(scores, NEG_INF), scores).softmax(-1) @ v


@spelling(empty(padded(mha)), scale=0.25, biases=1)
def large_number_added_to_a_whole_row(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 + (1.0 - keep[:, None, None].float()) * -1e9).softmax(-1) @ v


@spelling(empty(padded(cross)), scale=0.25, mask="padding", empty_row="absorbed")
def lowest_number_added_to_a_whole_row(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 + torch.where(keep[:, None, None], 0.0, LOWEST)).softmax(-1) @ v


@spelling(empty(padded(cross)), scale=0.25, mask="padding", empty_row="uniform")
def lowest_number_filled_into_a_whole_row(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).masked_fill(~keep[:, None, None], LOWEST).softmax(-1) @ v


@spelling(empty(padded(mha)), scale=0.25, biases=1)
def weak_number_filled_into_keys(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).masked_fill(~keep[:, None, None], -1e4).softmax(-1) @ v  # GPT-2 of old


@spelling(empty(padded(gqa)), scale=0.5, share=2, biases=1)
def small_number_filled_into_keys(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    return (torch.where(keep[:, None, None], q @ k.mT, -3.0) * 0.5).softmax(-1) @ v


@spelling(padded(with_last(mha, lambda: draw(H, S, S))), scale=0.25, biases=2, differentiable=4)
def weak_number_filled_into_keys_under_a_bias(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor
) -> Tensor:
    return ((q @ k.mT * 0.25).masked_fill(~keep[:, None, None], -50.0) + bias).softmax(-1) @ v


# --- scales that are tensors ---


@spelling(mha, scale=0.25)
def scale_of_one_element(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * torch.tensor([0.25])).softmax(-1) @ v


@spelling(
    with_last(with_last(mha, lambda: torch.rand(H, 1, 1) + 0.5), lambda: draw(H, S, S)),
    scale="tensor",
    biases=1,
    differentiable=5,
)
def bias_inside_a_learned_scale(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return ((q @ k.mT + bias) * scale).softmax(-1) @ v


@spelling(
    with_last(with_last(mha, lambda: torch.rand(H, 1, 1) + 0.5), lambda: draw(H, S, S)),
    scale="tensor",
    biases=1,
    differentiable=5,
)
def bias_outside_a_learned_scale(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)  # timm swin_transformer_v2.py
    return (q @ k.transpose(-2, -1) * torch.clamp(scale, max=math.log(100.0)).exp() + bias).softmax(-1) @ v


@spelling(with_last(mha, lambda: torch.rand(B, H, S, 1) + 0.5), scale="1/tensor")
def scale_per_query(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return (q @ k.mT / scale).softmax(-1) @ v


@spelling(with_last(cross, lambda: torch.rand(SK) + 0.5), scale=0.25, differentiable=4)
def scale_per_key(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 * scale).softmax(-1) @ v


@spelling(cross, scale="10/tensor")
def cosine_of_queries_and_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lengths = q.norm(dim=-1, keepdim=True) * k.norm(dim=-1, keepdim=True).mT
    return (q @ k.mT / lengths * 10.0).softmax(-1) @ v


@spelling(padded(mha), biases=1)
def mask_multiplied_and_added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    mask = keep[:, None, None].float()
    return (q @ k.mT * mask - 1e4 * (1.0 - mask)).softmax(-1) @ v  # HF openai-gpt, for padding


# --- casts in between ---


@spelling(mha, scale=0.25, mask="causal")
def scores_upcast_before_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.mT).float() * 0.25 + upper(q.shape[2], NEG_INF, torch.float32)
    return scores.to(torch.float64).softmax(-1).to(v.dtype) @ v


# --- in place ---


@spelling(with_last(mha, lambda: draw(H, S, S)), scale=0.125, biases=1, mask="causal", differentiable=4)
def everything_in_place(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    scores.mul_(0.5).div_(4.0).add_(bias)
    scores.masked_fill_(hidden(q, k), NEG_INF).sub_(3.0)
    return scores.softmax(-1) @ v


@spelling(single, scale=0.25)
def product_into_a_buffer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.zeros(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores.baddbmm_(q, k.mT, beta=0, alpha=0.25)
    return torch.bmm(scores.softmax(-1), v)


@spelling(
    with_last(mha, lambda: torch.rand(S, S) > 0.3),
    scale=0.25,
    mask="opaque",
    empty_row="nan",
    differentiable=0,
)
def mask_changed_after_it_was_read(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    mask = mask.clone()
    scores = (q @ k.mT * 0.25).masked_fill(mask, NEG_INF)
    mask[:, 0] = False
    return scores.softmax(-1) @ v + mask.sum()


# --- the product itself ---


@spelling(cross, scale=0.25)
def product_by_broadcasting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q.unsqueeze(-2) * k.unsqueeze(-3)).sum(-1)
    return (scores * 0.25).softmax(-1) @ v


@spelling(lambda: (draw(SQ, D), draw(SK, D), draw(SK, DV)), scale=0.25)
def product_by_inner(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.inner(q, k) * 0.25).softmax(-1) @ v


@spelling(lambda: (draw(SQ, H, D), draw(SK, D), draw(SK, DV)), scale=0.25, share=H)
def product_by_tensordot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tensordot(q, k, dims=([2], [1])).transpose(0, 1) * 0.25
    return (scores.softmax(-1) @ v).transpose(0, 1)


@spelling(cross, scale=0.25)
def product_by_vecdot(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.linalg.vecdot(q[:, :, :, None], k[:, :, None]) * 0.25).softmax(-1) @ v


@spelling(lambda: (draw(SQ, D), draw(SK, D), draw(SK, DV)), scale=0.25)
def product_by_linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (functional.linear(q, k.tanh()) * 0.25).softmax(-1) @ v


@spelling(lambda: (draw(1, D), draw(SK, D), draw(SK, DV)), scale=0.25)
def one_vector_asks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.mv(k, q.cos()[0]).mul(0.25).softmax(0)
    return weights[None] @ v


# --- windows, relative positions, several products ---


@spelling(
    with_last(
        lambda: (draw(2 * B, H, S, D), draw(2 * B, H, S, D), draw(2 * B, H, S, DV)), lambda: draw(B, S, S)
    ),
    scale=0.25,
    biases=1,
)
def windows_around_the_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * 0.25
    scores = scores.view(-1, B, H, q.shape[2], k.shape[2]) + mask.unsqueeze(1).unsqueeze(0)
    return scores.view(-1, H, q.shape[2], k.shape[2]).softmax(-1) @ v  # timm swin_transformer.py


@spelling(
    lambda: (draw(B, H, S, D), draw(B, H, S, D), draw(B, H, S, DV), draw(S, S, D)),
    scale=0.25,
    biases=1,
    differentiable=4,
)
def relative_keys(q: Tensor, k: Tensor, v: Tensor, distance: Tensor) -> Tensor:
    scores = q @ k.mT + torch.einsum("bhid,ijd->bhij", q, distance)  # HF bert, relative_key
    return (scores / 4).softmax(-1) @ v


@spelling(
    lambda: (draw(B, H, S, D), draw(B, H, S, D), draw(B, H, S, DV), draw(B, H, S, 2 * S)),
    scale=0.25,
    biases=1,
    differentiable=4,
)
def gathered_positions(q: Tensor, k: Tensor, v: Tensor, c2p: Tensor) -> Tensor:
    n = q.shape[2]
    index = (torch.arange(n)[:, None] - torch.arange(n)[None, :] + n).expand(q.shape[0], q.shape[1], n, n)
    return ((q @ k.mT) * 0.25 + torch.gather(c2p, -1, index) * 0.5).softmax(-1) @ v  # HF deberta_v2


@spelling(
    lambda: (draw(B, H, S, D), draw(B, H, S, D), draw(B, H, S, DV), draw(H, S, D)),
    scale=0.25,
    biases=1,
    differentiable=4,
)
def shifted_positions(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
    b, h, n, _ = q.shape
    raw = torch.matmul(q, positions.transpose(-1, -2))
    padded_raw = functional.pad(raw, (1, 0)).view(b, h, n + 1, n)[:, :, 1:].view_as(raw)  # Transformer-XL
    return ((q @ k.mT + padded_raw) * 0.25).softmax(-1) @ v


@spelling(by_position, scale=0.25)
def queries_and_keys_last_but_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bihd,bjhd->bijh", q, k) * 0.25
    return torch.einsum("bijh,bjhd->bihd", scores.softmax(2), v)


# --- caches ---


@spelling(
    lambda: (draw(B, H, 1, D), draw(B, H, 1, D), draw(B, H, 1, D), draw(B, H, SK, D), draw(B, H, SK, D)),
    scale=0.25,
    differentiable=5,
)
def cache_that_grows(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    k, v = torch.cat([past_k, k], dim=2), torch.cat([past_v, v], dim=2)
    return (q @ k.transpose(2, 3) * 0.25).softmax(-1) @ v


@spelling(
    lambda: (draw(B, H, 1, D), draw(B, H, 1, D), draw(B, H, 1, D), draw(B, H, SK, D), draw(B, H, SK, D)),
    scale=0.25,
    differentiable=0,
)
def cache_of_fixed_length(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> Tensor:
    place = torch.tensor([4])
    past_k, past_v = past_k.clone(), past_v.clone()
    past_k.index_copy_(2, place, k)
    past_v[:, :, 4:5] = v
    return (q @ past_k.transpose(2, 3) * 0.25).softmax(-1) @ past_v


@spelling(empty(padded(mha)), scale=0.25, mask="causal & padding", empty_row="absorbed")
def lowest_number_added_to_causal_rows(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    seen = ~hidden(q, k) & keep[:, None, None]
    return (q @ k.mT * 0.25 + torch.where(seen, 0.0, LOWEST)).softmax(-1) @ v  # HF, left padding


@spelling(empty(padded(gqa)), scale=0.25, share=2, mask="padding", empty_row="absorbed")
def lowest_number_added_with_grouped_heads(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    return (q @ k.mT * 0.25 + torch.where(keep[:, None, None], 0.0, LOWEST)).softmax(-1) @ v
