"""The softmax itself, and all that follows it, as real code spells them; each with what it means.

The sources are named in the comments; HF is huggingface/transformers. Sizes as in `spellings`.
"""

from collections.abc import Callable
from dataclasses import dataclass

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
    Spelling,
    cross,
    draw,
    gqa,
    mha,
    padded,
    repeat_kv,
    upper,
    with_last,
)
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Form(Spelling):
    """sinks: what the spec says of them."""

    sinks: str = ""


FORMS: list[Form] = []


def form(inputs: Inputs, **meaning: object) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Adds the function to FORMS; the scale is 0.25 unless said otherwise."""

    def add(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        FORMS.append(Form(attend, inputs, **{"scale": 0.25, **meaning}))  # type: ignore[arg-type]
        return attend

    return add


def scores_of(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT * 0.25


def heads() -> Tensor:
    return draw(H)


def with_sinks(make: Inputs) -> Inputs:
    """With a sink logit for each head."""
    return with_last(make, heads)


# --- learned sinks ---


@form(with_sinks(gqa), share=2, mask="causal", sinks="sink logits", differentiable=4)
def sink_behind_and_maximum_subtracted(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    weights = torch.matmul(q, k.transpose(2, 3)) * 0.25
    weights = weights + upper(q.shape[2], torch.finfo(q.dtype).min, q.dtype)
    sinks = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
    logits = torch.cat([weights, sinks], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values  # HF gpt_oss
    scores = functional.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]
    scores = functional.dropout(scores, p=0.1, training=False).to(v.dtype)
    return torch.matmul(scores, v).transpose(1, 2).contiguous()


@form(with_sinks(cross), sinks="sink logits", differentiable=4)
def sink_behind(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = scores_of(q.float(), k.float()).to(q.dtype)
    sinks = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return (
        functional.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1].to(v.dtype) @ v
    )  # HF flint


@form(with_sinks(cross), sinks="sink logits", differentiable=4)
def sink_in_front(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = scores_of(q, k)
    column = sinks[None, :, None, None].expand(q.shape[0], -1, q.shape[2], 1)
    return torch.cat((column, scores), dim=-1).softmax(dim=-1)[..., 1:] @ v  # lucidrains/x-transformers


@form(
    lambda: (draw(S, HKV, 2, D), draw(S, HKV, D), draw(S, HKV, D), draw(HKV * 2)),
    share=2,
    mask="causal",
    sinks="sink logits",
    differentiable=4,
)
def sink_without_a_batch(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    n = q.shape[0]
    k, v = (x[:, :, None, :].expand(-1, -1, 2, -1) for x in (k, v))
    scores = torch.einsum("qhmd,khmd->hmqk", q, k)  # openai/gpt-oss torch/model.py
    scores *= 0.25
    scores += upper(n, NEG_INF, q.dtype)[None, None]
    column = sinks.reshape(HKV, 2, 1, 1).expand(-1, -1, n, -1)
    weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    return torch.einsum("hmqk,khmd->qhmd", weights, v).reshape(n, -1)


@form(with_last(cross, lambda: draw(B, H, SQ, 1)), sinks="sink logits per query", differentiable=4)
def sink_of_each_query(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    logits = torch.cat([scores_of(q, k), sinks], dim=-1).float()  # HF inkling2
    return (logits - logits.max(dim=-1, keepdim=True).values).softmax(-1)[..., :-1].to(v.dtype) @ v


@form(padded(with_sinks(cross)), sinks="sink logits", mask="padding", empty_row="zero", differentiable=4)
def sink_as_a_gate_on_the_output(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k).masked_fill(~keep[:, None, None], torch.finfo(q.dtype).min)
    gate = (torch.logsumexp(scores, dim=-1) - sinks.view(1, -1, 1)).to(q.dtype).sigmoid()
    out = functional.softmax(scores, dim=-1) @ v * gate.unsqueeze(-1)
    return out.transpose(1, 2).contiguous()  # HF granite_swa


@form(with_sinks(cross), sinks="sink logits", differentiable=4)
def sink_in_the_sum(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores, sinks = scores_of(q, k), sinks[None, :, None, None]
    top = torch.maximum(scores.max(-1, keepdim=True).values, sinks)
    weights = torch.exp(scores - top)  # fla ops/attn/naive.py
    return weights / (weights.sum(-1, keepdim=True) + torch.exp(sinks - top)) @ v


@form(cross, sinks="sink logits")
def one_more_in_the_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).exp()
    return (weights / (1 + weights.sum(-1, keepdim=True))) @ v


@form(cross, sinks="sink logits")
def one_more_in_the_sum_and_maximum_subtracted(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    return (weights / (weights.sum(-1, keepdim=True) + torch.exp(-top))) @ v


@form(cross, sinks="sink logits")
def column_of_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.pad(scores_of(q, k), (0, 1)).softmax(-1)[..., :-1] @ v


@form(cross, sinks="sink logits")
def column_of_zeros_joined(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return torch.cat([scores.new_zeros(*scores.shape[:-1], 1), scores], -1).softmax(-1)[..., 1:] @ v


@form(cross, sinks="sink logits")
def small_number_in_the_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = scores_of(q, k).exp()
    return (weights / (weights.sum(-1, keepdim=True) + 1e-3)) @ v


# --- the softmax written out ---


@form(cross)
def exp_over_its_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(scores_of(q, k))
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


@form(cross)
def exp_without_the_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).detach())
    return (weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-6)) @ v


@form(mha, mask="causal")
def exp_times_one_over_its_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k) + upper(q.shape[2], NEG_INF)
    weights = torch.exp(scores - scores.max(dim=-1)[0][..., None])
    return (weights * weights.sum(-1).unsqueeze(-1).reciprocal()) @ v


@form(cross)
def divided_after_the_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(scores_of(q, k))
    return (weights @ v) / weights.sum(dim=-1, keepdim=True)


@form(cross)
def divided_after_the_values_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.25
    weights = (scores - scores.max(-1, keepdim=True).values).exp()
    total = torch.einsum("bhij->bhi", weights)
    return (torch.einsum("bhij,bhjd->bhid", weights, v) / total[..., None]).transpose(1, 2)


@form(cross)
def divided_by_a_column_of_ones(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    out = torch.exp(scores_of(q, k)) @ values
    return out[..., :-1] / out[..., -1:]


@form(cross)
def divided_by_a_padded_column(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    out = (scores - scores.amax(-1, keepdim=True)).exp() @ functional.pad(v, (0, 1), value=1.0)
    return out[..., :-1] / out[..., -1:]


@form(padded(cross), mask="padding", empty_row="nan")
def exp_times_a_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    weights = torch.exp(scores_of(q, k)) * keep[:, None, None, :]
    return (weights / weights.sum(dim=-1, keepdim=True)) @ v


@form(mha, mask="causal")
def exp_masked_by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    weights = torch.where(seen, scores_of(q, k).exp(), 0.0)
    return weights @ v / weights.sum(dim=-1, keepdim=True)


@form(cross)
def exp_of_log_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.log_softmax(scores_of(q, k), dim=-1).exp() @ v


@form(cross)
def exp_of_the_difference_to_logsumexp(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = scores_of(q, k)
    return torch.exp(scores - torch.logsumexp(scores, dim=-1, keepdim=True)) @ v  # HF reformer


@form(cross)
def exp_over_the_first_of_two_axes(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.exp(k @ q.mT * 0.25)
    return (weights / weights.sum(dim=-2, keepdim=True)).mT @ v


# --- after the softmax ---


@form(padded(mha), mask="padding", empty_row="zero")
def masked_again(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    hidden = ~keep[:, None, None, :]
    return scores_of(q, k).masked_fill(hidden, -1e30).softmax(-1).masked_fill(hidden, 0.0) @ v


@form(with_last(cross, lambda: torch.rand(B, SQ, SK) > 0.4), mask="opaque", empty_row="zero")
def masked_again_by_an_equal_tensor(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    low, zero = (torch.scalar_tensor(x, dtype=q.dtype) for x in (NEG_INF, 0))
    scores = torch.masked_fill(
        scores_of(q, k), seen.view(-1, 1, q.shape[2], k.shape[2]) == torch.tensor(False), low
    )
    weights = torch.softmax(scores, -1)
    return (
        torch.masked_fill(weights, seen.view(-1, 1, q.shape[2], k.shape[2]) == torch.tensor(False), zero) @ v
    )  # HF cpmant


@form(padded(mha), mask="padding", empty_row="nan")
def masked_again_by_a_product(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    seen = keep[:, None, None, :]
    return (scores_of(q, k).masked_fill(~seen, NEG_INF).softmax(-1) * seen) @ v


@form(padded(mha), mask="padding", empty_row="zero", differentiable=0)
def numbers_instead_of_nan(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return scores_of(q, k).masked_fill(~keep[:, None, None], NEG_INF).softmax(-1).nan_to_num(0.0) @ v


@form(padded(mha), mask="padding", empty_row="zero", differentiable=0)
def zeros_where_nan(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    weights = scores_of(q, k).masked_fill(~keep[:, None, None], NEG_INF).softmax(-1)
    return torch.where(weights.isnan(), 0.0, weights) @ v


@form(with_last(cross, heads), differentiable=4)
def weights_times_a_head_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = functional.softmax(scores_of(q, k), dim=-1) * mask.view(1, -1, 1, 1)  # HF bert, layer_head_mask
    return (weights / 2.0).to(v.dtype) @ v


@form(with_last(cross, lambda: torch.rand(B, SQ) > 0.5))
def weights_of_padded_queries_cleared(q: Tensor, k: Tensor, v: Tensor, padded_query: Tensor) -> Tensor:
    return scores_of(q, k).softmax(-1).masked_fill(padded_query[:, None, :, None], 0) @ v


@form(lambda: (draw(B, H, S, D), draw(B, HKV, S, D), draw(B, H, S, D)))
def keys_and_values_shared_differently(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.repeat_interleave(2, dim=1)
    v = torch.cat(v.chunk(2, dim=1), dim=-1).repeat(1, 2, 1, 1)  # HF diffllama
    first, second = torch.chunk(scores_of(q, k).softmax(-1) @ v, 2, dim=1)
    return first - 0.3 * second


@form(
    padded(lambda: (draw(B, SQ, H * D), draw(B, SK, H * D), draw(B, SK, H * DV))),
    mask="padding",
    empty_row="nan",
)
def one_query_axis_of_bert(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    q, k, v = (x.view(x.shape[0], -1, H, x.shape[-1] // H).permute(0, 2, 1, 3) for x in (q, k, v))
    weights = torch.nn.Softmax(dim=-1)(scores_of(q, k).masked_fill(~keep[:, None, None], NEG_INF))
    out = torch.matmul(torch.nn.Dropout(0.0)(weights), v).permute(0, 2, 1, 3).contiguous()
    return out.view(out.shape[0], -1, H * DV)


@form(mha)
def values_times_weights_of_a_single_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.stack([scores_of(q[0], k[0]).softmax(-1) @ v[0]])
