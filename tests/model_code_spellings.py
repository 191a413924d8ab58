"""Attention as the reference code of language models spells it, outside of transformers; each with what it means."""

from collections.abc import Callable

import torch
from near_misses import NearMiss
from spellings import DV, HKV, NEG_INF, SK, SQ, Add, B, D, H, Inputs, S, Spelling, collect, draw, gqa, mha
from torch import Tensor

MODELS: list[Spelling] = []
spelling = collect(MODELS)
MODEL_NEAR_MISSES: list[NearMiss] = []
LOWEST = torch.finfo(torch.float32).min


def near_miss(inputs: Inputs, reason: str | None = None) -> Add:
    """Adds the function to MODEL_NEAR_MISSES."""

    def add(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        MODEL_NEAR_MISSES.append(NearMiss(attend, inputs, reason))
        return attend

    return add


def after_a_cache() -> tuple[Tensor, ...]:
    """(B, H, S, D), with 4 more keys than queries."""
    return draw(B, H, S, D), draw(B, H, S + 4, D), draw(B, H, S + 4, D)


def one_key_head() -> tuple[Tensor, ...]:
    """Queries (B, S, H, D); keys and values without heads."""
    return draw(B, S, H, D), draw(B, S, D), draw(B, S, D)


def latent() -> tuple[Tensor, ...]:
    """Two parts of queries (B, S, H, .); latent keys, which are the values as well; keys that are rotated."""
    return draw(B, S, H, D), draw(B, S, D), draw(B, S, H, HKV), draw(B, S, HKV)


def above(n: int) -> Tensor:
    return torch.full((n, n), NEG_INF).triu(1)


# --- masks put together ---


@spelling(after_a_cache, scale=0.25, mask="causal(Sk-Sq)", empty_row_symbolic="nan")
def zeros_beside_a_triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, before = q.shape[2], k.shape[2] - q.shape[2]
    mask = torch.hstack([torch.zeros(n, before), above(n)]).type_as(q)  # meta-llama/llama3 model.py
    scores = torch.matmul(q, k.transpose(2, 3)) / 4.0 + mask
    return torch.matmul(torch.softmax(scores.float(), dim=-1).type_as(q), v)


@spelling(mha, scale=0.25, mask="causal & window(4)")
def logarithm_of_a_band(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    band = torch.full((n, n), fill_value=1, dtype=q.dtype)
    mask = torch.log(torch.triu(torch.tril(band, diagonal=0), diagonal=-3))  # mistralai/mistral-src
    return torch.softmax(q @ k.mT * 0.25 + mask[None, None], dim=-1) @ v


@spelling(after_a_cache, mask="causal(Sk-Sq)", empty_row_symbolic="uniform")
def the_last_of_a_large_triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, columns = q.shape[2], k.shape[2]
    n = max(rows, columns)  # mosaicml/llm-foundry attention.py
    hidden = ~torch.ones(n, n, dtype=torch.float32).tril().to(torch.bool)
    hidden = hidden[-rows:, -columns:].view(1, 1, rows, columns)
    return (q @ k.mT).masked_fill(hidden, LOWEST).softmax(-1) @ v


@spelling(
    lambda: (*after_a_cache(), torch.tril(torch.ones(32, 32, dtype=torch.bool))[None, None]),
    scale=0.25,
    mask="opaque",
    empty_row="uniform",
)
def zeros_in_baddbmm(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    b, h, n, d = q.shape
    rows = k.shape[2]
    scores = torch.zeros(b * h, n, rows, dtype=q.dtype)  # EleutherAI/gpt-neox, HF before 4.4x
    scores = torch.baddbmm(scores, q.reshape(b * h, n, d), k.reshape(b * h, rows, d).mT, alpha=0.25)
    scores = torch.where(seen[:, :, rows - n : rows, :rows], scores.view(b, h, n, rows), LOWEST)
    return torch.softmax(scores, dim=-1) @ v


# --- heads that share one key head, behind the queries ---


@spelling(latent, share=H, scale=0.25, mask="causal", differentiable=4)
def latent_keys_absorbed(q: Tensor, c: Tensor, q_turned: Tensor, k_turned: Tensor) -> Tensor:
    scores = torch.einsum("bshc,btc->bsht", q, c)  # deepseek-ai/DeepSeek-V3 inference/model.py
    scores = (scores + torch.einsum("bshr,btr->bsht", q_turned, k_turned)) * 0.25
    scores += above(q.shape[1]).unsqueeze(1)
    return torch.einsum("bsht,btc->bshc", scores.softmax(dim=-1), c)


@spelling(one_key_head, share=H, mask="causal")
def one_key_head_behind_the_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)[:, None]
    scores = torch.einsum("bihd,bjd->bihj", q, k).masked_fill(hidden, NEG_INF)
    return torch.einsum("bihj,bjd->bihd", scores.softmax(-1), v)


@spelling(gqa, share=2, mask="causal", scale=0.25)
def grouped_heads_between_queries_and_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = q.unflatten(1, (HKV, -1))
    scores = torch.einsum("bkgqd,bkcd->bkgqc", q, k) * 0.25
    scores = torch.where(torch.ones(q.shape[3], k.shape[2]).tril().bool(), scores, LOWEST)
    return torch.einsum("bkgqc,bkcd->bkgqd", scores.softmax(-1), v).flatten(1, 2)


# --- near misses ---


@near_miss(after_a_cache)
def zeros_below_a_triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, before = q.shape[2], k.shape[2] - q.shape[2]
    return (q @ k.mT + torch.hstack([above(n), torch.zeros(n, before)])).softmax(-1) @ v


@near_miss(after_a_cache)
def a_triangle_of_wrong_height(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, before = q.shape[2], k.shape[2] - q.shape[2]
    return (q @ k.mT + torch.hstack([torch.zeros(n, before), above(n).flip(0)])).softmax(-1) @ v


@near_miss(mha)
def logarithm_of_more_than_a_band(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + (torch.ones(q.shape[2], k.shape[2]).tril() + 0.5).log()).softmax(-1) @ v


@near_miss(mha)
def logarithm_of_what_is_negative(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + (torch.ones(q.shape[2], k.shape[2]).tril() - 0.5).log()).softmax(-1) @ v  # NaN


@near_miss(after_a_cache)
def the_first_of_a_large_triangle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, columns = q.shape[2], k.shape[2]
    n = max(rows, columns)
    hidden = torch.ones(n, n).triu(1).bool()[:rows, -columns:]
    return (q @ k.mT).masked_fill(hidden, LOWEST).softmax(-1) @ v


@near_miss(after_a_cache)
def ones_in_baddbmm_of_a_scaled_input(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    added = torch.zeros(b * h, n, k.shape[2], dtype=q.dtype)
    added[:, :, 0] = 3.0
    scores = torch.baddbmm(added, q.reshape(b * h, n, d), k.reshape(b * h, -1, d).mT, alpha=0.25)
    return torch.softmax(scores.view(b, h, n, -1), dim=-1) @ v


@near_miss(one_key_head)
def heads_that_see_different_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.arange(H)[:, None] > torch.arange(k.shape[1])
    scores = torch.einsum("bihd,bjd->bihj", q, k).masked_fill(~hidden & (torch.arange(S) > 3), NEG_INF)
    return torch.einsum("bihj,bjd->bihd", scores.softmax(-1), v)


@near_miss(lambda: (*one_key_head(), draw(S, 1, S), draw(H, S)))
def biases_by_query_and_by_head(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, heads: Tensor) -> Tensor:
    scores = torch.einsum("bihd,bjd->bihj", q, k) + rows + heads
    return torch.einsum("bihj,bjd->bihd", scores.softmax(-1), v)


@near_miss(lambda: (*one_key_head(), draw(H, S)))
def a_bias_by_head_alone(q: Tensor, k: Tensor, v: Tensor, heads: Tensor) -> Tensor:
    scores = torch.einsum("bihd,bjd->bihj", q, k) + heads
    return torch.einsum("bihj,bjd->bihd", scores.softmax(-1), v)


@near_miss(lambda: (draw(B, H, SQ, D), draw(B, H, SK, D), draw(B, H, SK, DV)), "add the outputs")
def differences_of_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first, second = (q @ k.mT).softmax(-1), (q @ k.sin().mT).softmax(-1)
    return (first - 0.3 * second) @ v  # Differential Transformer, arXiv 2410.05258


@near_miss(lambda: (draw(B, H, SQ, D), draw(B, H, SK, D), draw(B, H, SK, DV)), "in one product")
def weights_cut_in_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights[..., :4] @ v[..., :4, :] + weights[..., 4:] @ v[..., 4:, :]
