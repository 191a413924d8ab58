"""SparQ for many queries at once: each query of a text as one decoding step over the keys before it. Plain torch.

What a teacher-forced evaluation computes: the same as decoding the text token by token, without a step for each token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from attnopt.errors import OptionError, ShapeError
from attnopt.kernels.sparq.request import DTYPES
from attnopt.kernels.sparq.steps import accumulator, logit_scale, top_indices

#: The most scores (heads times queries times keys) that a block of queries holds at once.
MOST_SCORES = 2**25


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Operands and choices; q (B, H, S, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), kept (B, S) bool or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    kept: Tensor | None
    rank: int
    topk: int
    local: int
    scale: float
    mean_value: bool


def sparq_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rank: int = 32,
    topk: int = 128,
    local: int = 32,
    first: int = 0,
    scale: float | None = None,
    key_padding: Tensor | None = None,
    mean_value: bool | None = None,
) -> Tensor:
    """(B, H, S, Dv): row i is `sparq_attention` of query i over keys 0 to i, for i >= first; before, exact attention.

    q: (B, H, S, D); k: (B, Hkv, S, D); v: (B, Hkv, S, Dv), one floating dtype. first: the length of the prompt, which
    is attended to exactly. key_padding: (B, S) bool, True = keep; a query that sees no key returns zeros. The rest as
    in `sparq_attention`. Work and memory are those of dense attention (block by block); nothing is fast here but the
    number of steps.

    Raises ShapeError where the operands do not fit, OptionError for a rank, topk, local or first that cannot be.
    """
    _check(q, k, v, rank, topk, local, first)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mean_value = q.shape[1] == k.shape[1] if mean_value is None else mean_value
    rows = Rows(q, k, v, key_padding, rank, topk, local, scale, mean_value)
    length, heads = q.shape[2], q.shape[0] * q.shape[1]
    means = _running_means(rows) if mean_value else None
    parts, start = [_prompt(rows, first)], first
    while start < length:
        stop = min(length, start + max(1, MOST_SCORES // (heads * length)))
        parts.append(_block(rows, start, stop, means))
        start = stop
    return torch.cat(parts, dim=2)


def _prompt(rows: Rows, first: int) -> Tensor:
    q, k, v = (x[:, :, :first] for x in (rows.q, rows.k, rows.v))
    is_shared = q.shape[1] != k.shape[1]
    if rows.kept is None:
        return functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=rows.scale, enable_gqa=is_shared
        )
    seen = _seen(rows, 0, first)
    v = v.masked_fill(~rows.kept[:, None, :first, None], 0.0)
    k = k.masked_fill(~rows.kept[:, None, :first, None], 0.0)
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen[:, None], scale=rows.scale, enable_gqa=is_shared
    )
    return out.masked_fill(~seen.any(-1)[:, None, :, None], 0.0)


def _block(rows: Rows, start: int, stop: int, means: Tensor | None) -> Tensor:
    """(B, H, stop - start, Dv): the queries from `start` to `stop` - 1."""
    dtype = accumulator(rows.q.dtype)
    k, v = (x[:, :, :stop].to(dtype) for x in (rows.k, rows.v))
    q = rows.q[:, :, start:stop].to(dtype).unflatten(1, (k.shape[1], -1))  # (B, Hkv, G, n, D)
    seen = _seen(rows, start, stop)
    if rows.kept is not None:  # what padded rows hold may be NaN, which 0 would not silence
        k, v = (x.masked_fill(~rows.kept[:, None, :stop, None], 0.0) for x in (k, v))
    scores = _approximate(rows, q, k, seen)
    chosen = _chosen(rows, scores.sum(dim=2), seen)
    logits = rows.scale * (q @ k[:, :, None].mT)
    out = _softmax(logits, chosen[:, :, None]) @ v[:, :, None]
    if means is not None:
        covered = (scores * chosen[:, :, None]).sum(-1, keepdim=True)
        covered = covered.masked_fill((seen.sum(-1) <= rows.topk)[:, None, None, :, None], 1.0)
        mean = means[:, :, None, start:stop]
        out = torch.where(covered == 1, out, covered * out + (1 - covered) * mean)
    return out.flatten(1, 2).to(rows.q.dtype)


def _approximate(rows: Rows, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
    """(B, Hkv, G, n, keys): the scores that the chosen channels give; the other channels count as zeros."""
    channels = top_indices(q.abs().sum(dim=2), min(rows.rank, q.shape[-1]))
    part = torch.zeros_like(q[:, :, 0]).scatter_(-1, channels, 1.0)[:, :, None]
    q_r = q * part
    return _softmax((q_r * logit_scale(q, q_r, rows.scale)) @ k[:, :, None].mT, seen[:, None, None])


def _chosen(rows: Rows, weight: Tensor, seen: Tensor) -> Tensor:
    """(B, Hkv, n, keys) bool: for each query at most topk of the keys that it sees, the last `local` among them."""
    after = seen.sum(-1, keepdim=True) - seen.cumsum(-1)  # how many of the keys that it sees come later
    is_local = seen & (after < rows.local)
    weight = weight.masked_fill(is_local[:, None], torch.inf).masked_fill(~seen[:, None], -1.0)
    best = top_indices(weight, min(rows.topk, weight.shape[-1]))
    found = torch.zeros_like(weight, dtype=torch.bool).scatter_(-1, best, value=True)
    return found & seen[:, None]


def _seen(rows: Rows, start: int, stop: int) -> Tensor:
    """(B, n, stop) bool: the kept keys that each query sees."""
    at = torch.arange(stop, device=rows.q.device)
    causal = (at <= at[start:, None])[None]
    return causal.expand(len(rows.q), -1, -1) if rows.kept is None else causal & rows.kept[:, None, :stop]


def _softmax(logits: Tensor, seen: Tensor) -> Tensor:
    hidden = ~seen
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).masked_fill(hidden, 0.0)


def _running_means(rows: Rows) -> Tensor:
    """(B, Hkv, S, Dv): the mean of the kept values up to each position."""
    v = rows.v.to(accumulator(rows.q.dtype))
    if rows.kept is None:
        count = torch.arange(1, v.shape[2] + 1, device=v.device)[:, None]
        return v.cumsum(dim=2) / count
    total = v.masked_fill(~rows.kept[:, None, :, None], 0.0).cumsum(dim=2)
    return total / rows.kept.cumsum(-1).clamp_min(1)[:, None, :, None]


def _check(q: Tensor, k: Tensor, v: Tensor, rank: int, topk: int, local: int, first: int) -> None:
    fits = q.ndim == k.ndim == v.ndim == 4 and q.shape[2:] == k.shape[2:] and k.shape[:3] == v.shape[:3]
    if not fits or q.shape[0] != k.shape[0] or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ShapeError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; wanted (B, H, S, D), (B, Hkv, S, D) and "
            "(B, Hkv, S, Dv), a query for each key, H a multiple of Hkv"
        )
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ShapeError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; wanted one floating dtype")
    if rank < 1 or topk < 1 or not 0 <= local <= topk or not 0 <= first <= q.shape[2]:
        raise OptionError(
            f"rank={rank}, topk={topk}, local={local}, first={first}; wanted rank and topk from 1, local from 0 to "
            f"topk, and first from 0 to the number of queries, {q.shape[2]}"
        )
