"""Keys hidden by a number that may still weigh, as real code spells it; each with what it means.

The sources are named in the comments. Sizes as in `spellings`.
"""

import torch
from spellings import (
    FIXED,
    NEG_INF,
    B,
    D,
    H,
    S,
    cross,
    draw,
    gqa,
    mha,
    padded,
    repeat_kv,
    with_last,
)
from spellings_forms import Form, scores_of
from torch import Tensor

__all__ = ["FIXED", "WEIGHING"]

WEIGHING: list[Form] = []


def weighing(inputs, number: float, **meaning: object):
    """Adds the function to WEIGHING; `number` is the logit of each hidden key."""

    def add(attend):
        said = {"scale": 0.25, "sinks": f"hidden={number:g}", **meaning}
        WEIGHING.append(Form(attend, inputs, **said))
        return attend

    return add


def pairs() -> Tensor:
    """Which keys each query sees; one sees none."""
    seen = torch.rand(B, S, S) > 0.3
    seen[0, 2] = False
    return seen


def later(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)


@weighing(with_last(mha, pairs), -1e4, mask="opaque", differentiable=3)
def pairs_at_ten_thousand(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return scores_of(q, k).masked_fill(~keep[:, None], -10000.0).softmax(-1) @ v  # NVIDIA/Megatron-LM


@weighing(mha, -1e4, mask="causal", differentiable=3)
def later_keys_at_ten_thousand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.where(later(q, k), -1e4, scores_of(q, k)).softmax(-1) @ v  # karpathy/minGPT's forks


@weighing(gqa, -1e4, mask="causal", share=2, differentiable=3)
def later_keys_of_shared_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = repeat_kv(k, 2), repeat_kv(v, 2)
    return scores_of(q, k).masked_fill(later(q, k), -1e4).softmax(-1) @ v


@weighing(cross, -1e4, mask="causal", differentiable=3)
def later_keys_of_another_length(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores_of(q, k).masked_fill(later(q, k), -1e4).softmax(-1) @ v


@weighing(mha, -1e4, mask="causal", differentiable=3)
def blended_with_ten_thousand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = torch.tril(torch.ones(q.shape[2], k.shape[2], dtype=q.dtype))[None, None]
    return (scores_of(q, k) * seen + -1e4 * (1 - seen)).softmax(-1) @ v  # openai/finetune-transformer-lm


@weighing(padded(mha), -1e4, mask="opaque & padding", differentiable=3)
def padding_of_queries_and_keys(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    seen = keep[:, None, :, None] * keep[:, None, None, :]
    return scores_of(q, k).masked_fill(seen == 0, -1e4).softmax(-1) @ v  # jaywalnut310/vits


@weighing(with_last(mha, pairs), 0.0, mask="opaque", differentiable=3)
def pairs_at_zero(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return scores_of(q, k).masked_fill(~keep[:, None], 0.0).softmax(-1) @ v


@weighing(with_last(mha, pairs), 1e9, mask="opaque", differentiable=3)
def pairs_above_all_others(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep[:, None], scores_of(q, k), 1e9).softmax(-1) @ v


@weighing(with_last(mha, pairs), -1e4, mask="opaque", differentiable=3)
def tensor_filled_in(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return torch.where(keep[:, None], scores_of(q, k), torch.full_like(q @ k.mT, -1e4)).softmax(-1) @ v


@weighing(padded(with_last(mha, lambda: draw(H, S, S))), -1e4, mask="padding bias", differentiable=4)
def number_over_a_bias(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, keep: Tensor) -> Tensor:
    return (scores_of(q, k) + bias).masked_fill(~keep[:, None, None], -1e4).softmax(-1) @ v


@weighing(with_last(mha, pairs), -5.0, mask="opaque", differentiable=3)
def number_beside_raised_scores(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (scores_of(q, k) + 2.0).masked_fill(~keep[:, None], -3.0).softmax(-1) @ v


@weighing(with_last(mha, pairs), -0.75, mask="opaque", differentiable=3)
def filled_and_then_scaled(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(~keep[:, None], -3.0) * 0.25).softmax(-1) @ v


@weighing(with_last(mha, pairs), -3.0, mask="opaque", differentiable=3)
def filled_and_then_lowered_by_the_largest(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k).masked_fill(~keep[:, None], -3.0)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ v


@weighing(padded(mha), -2.0, mask="causal & padding", differentiable=3)
def filled_twice_with_one_number(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k).masked_fill(later(q, k), -2.0)
    return scores.masked_fill(~keep[:, None, None], -2.0).softmax(-1) @ v


@weighing(padded(with_last(mha, lambda: torch.rand(H) + 0.1)), -4.0, mask="causal alibi", differentiable=3)
def number_beside_a_line(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, keep: Tensor) -> Tensor:
    del keep
    places = torch.arange(q.shape[2])
    distance = places[None, :] - places[:, None]
    scores = scores_of(q, k) + slopes.detach()[:, None, None] * distance
    return scores.masked_fill(later(q, k), -4.0).softmax(-1) @ v


@weighing(with_last(mha, pairs), -1.0, mask="opaque bias", differentiable=3)
def number_beside_a_line_of_keys_alone(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """A line from the query's own place would be the same softmax, were it not for the number."""
    line = torch.arange(k.shape[2], dtype=q.dtype)
    return (scores_of(q, k) + 0.5 * line).masked_fill(~keep[:, None], -1.0).softmax(-1) @ v


@weighing(with_last(mha, pairs), -6.0, mask="opaque bias", differentiable=3)
def number_beside_what_hides_keys(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = scores_of(q, k) + torch.zeros_like(later(q, k), dtype=q.dtype).masked_fill(later(q, k), NEG_INF)
    return scores.masked_fill(~keep[:, None], -6.0).softmax(-1) @ v


assert D == 16  # 0.25 is its scale
