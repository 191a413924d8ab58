"""The SparQ algorithm as literally as it can be written: one head at a time, in the dtype it is given. The oracle."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What is decided for one batch row and the G query heads of one key/value head.

    channels (r,); positions: at most topk of the kept ones; scores (G, Sk), zero where not kept.
    """

    channels: list[int]
    positions: list[int]
    scores: Tensor


def sparq_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rank: int,
    topk: int,
    local: int,
    scale: float | None = None,
    v_mean: Tensor | None = None,
    key_padding: Tensor | None = None,
    mean_value: bool | None = None,
) -> Tensor:
    """SparQ attention by its definition (arXiv 2312.04985, algorithm 1), in the dtype of q; nothing is fast here.

    q (B, H, 1, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), v_mean (B, Hkv, Dv), key_padding (B, Sk) bool, True = keep.
    Returns (B, H, 1, Dv) in q's dtype. Defaults as in `sparq_attention`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    mean_value = group == 1 if mean_value is None else mean_value
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for b in range(q.shape[0]):
        kept = torch.ones(k.shape[2], dtype=torch.bool) if key_padding is None else key_padding[b]
        if not kept.any():
            continue
        for h in range(k.shape[1]):
            heads = slice(h * group, (h + 1) * group)
            decision = decide(q[b, heads, 0], k[b, h], kept, rank=rank, topk=topk, local=local, scale=scale)
            mean = (
                None
                if not mean_value
                else v[b, h][kept].mean(0)
                if v_mean is None
                else v_mean[b, h].to(v.dtype)
            )
            out[b, heads, 0] = attend_to(q[b, heads, 0], k[b, h], v[b, h], decision, scale, mean)
    return out


def decide(q: Tensor, k: Tensor, kept: Tensor, *, rank: int, topk: int, local: int, scale: float) -> Decision:
    """The choices for one group: q (G, D), k (Sk, D), kept (Sk,) bool with at least one True."""
    channels = largest(q.abs().sum(0).tolist(), rank)
    scores = torch.stack([approximate(row, k, channels, kept, scale) for row in q])
    visible = kept.nonzero().flatten().tolist()
    weight = scores.sum(0)
    weight[visible[len(visible) - min(local, len(visible)) :]] = torch.inf
    ranked = largest(weight[visible].tolist(), topk)
    return Decision(channels, [visible[i] for i in ranked], scores)


def approximate(q: Tensor, k: Tensor, channels: list[int], kept: Tensor, scale: float) -> Tensor:
    """s_hat (Sk,): softmax over the kept positions of the logits of one query q (D,) on the chosen channels."""
    part, whole = q[channels].abs().sum(), q.abs().sum()
    scores = q.new_zeros(len(k))
    logits = k[kept][:, channels] @ q[channels]
    heat = scale * (whole / part).sqrt() if part > 0 else 0.0
    scores[kept] = (logits * heat).softmax(0)
    return scores


def attend_to(
    q: Tensor, k: Tensor, v: Tensor, decision: Decision, scale: float, mean: Tensor | None
) -> Tensor:
    """(G, Dv): exact attention over the chosen positions, blended with the mean value (Dv,) if there is one."""
    chosen = decision.positions
    out = (scale * q @ k[chosen].T).softmax(-1) @ v[chosen]
    if mean is None:
        return out
    covered = decision.scores[:, chosen].sum(-1, keepdim=True)
    return covered * out + (1 - covered) * mean


def largest(values: list[float], count: int) -> list[int]:
    """Indices of the `count` largest values, the lower index first among equals."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:count]
