"""SparQ decoding in plain torch: four pure steps and their composition (arXiv 2312.04985, algorithm 1).

Here q is grouped: (B, Hkv, G, D), in the dtype that accumulates (fp32; fp64 for fp64 inputs). `kept` is (B, Sk) bool
or None. The paper divides the logits by tau = sqrt(D |q_r|_1 / |q|_1). With a scale other than D^-0.5 that becomes

    s_hat = softmax(scale * sqrt(|q|_1 / |q_r|_1) * q_r . K_r)

so that the logits stand for scale * q . K whatever the scale, and are those very logits when every channel is read.
"""

import torch
from torch import Tensor

from attnopt.kernels.sparq.request import Request

#: Subtracted from, a position becomes the low half of a key: the lower index then has the larger key.
LAST = 2**31 - 1


def decode(request: Request) -> Tensor:
    """(B, H, 1, Dv) in q's dtype: one step of SparQ attention, or of exact attention when topk >= Sk."""
    q = grouped(request)
    if request.is_exact:
        return ungrouped(attend(q, request.k, request.v, None, request.scale, request.kept), request)
    channels = choose_channels(q, request.channels)
    scores = approximate_scores(q, request.keys_by_channel, channels, request.scale, request.kept)
    positions = choose_positions(scores, request.topk, request.local, request.kept)
    out = attend(q, request.k, request.v, positions, request.scale, request.kept)
    if request.mean_value:
        covered = covered_mass(scores, positions, request.kept)
        out = torch.where(
            covered == 1, out, covered * out + (1 - covered) * mean_of_values(request)[:, :, None]
        )
    return ungrouped(out, request)


def grouped(request: Request) -> Tensor:
    """q as (B, Hkv, G, D), in the dtype that accumulates."""
    q = request.q.to(accumulator(request.q.dtype))
    return q.reshape(q.shape[0], request.k.shape[1], request.group, q.shape[3])


def ungrouped(out: Tensor, request: Request) -> Tensor:
    """(B, Hkv, G, Dv) back to (B, H, 1, Dv), contiguous, in q's dtype."""
    shape = (*request.q.shape[:3], out.shape[-1])
    return out.to(request.q.dtype).reshape(shape).contiguous()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of `dtype` are held."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def choose_channels(q: Tensor, rank: int) -> Tensor:
    """(B, Hkv, rank) int64, ascending: the channels with the largest |q| summed over the heads of the group."""
    return top_indices(q.abs().sum(dim=2), rank)


def approximate_scores(q: Tensor, k_t: Tensor, channels: Tensor, scale: float, kept: Tensor | None) -> Tensor:
    """(B, Hkv, G, Sk): softmax over the kept positions of the logits that the chosen channels give, head by head.

    q (B, Hkv, G, D), k_t (B, Hkv, D, Sk) of which only the chosen rows are read, channels (B, Hkv, r).
    """
    q_r = q.gather(-1, channels[:, :, None].expand(*q.shape[:3], -1))
    return masked_softmax(
        chosen_products(q_r * logit_scale(q, q_r, scale), k_t, channels), kept_at(kept, None)
    )


def chosen_products(q_r: Tensor, k_t: Tensor, channels: Tensor) -> Tensor:
    """(B, Hkv, G, Sk): q_r (B, Hkv, G, r) times the chosen rows of k_t (B, Hkv, D, Sk).

    One group after the other: its rows stay in the cache, where those of all groups would go to memory and back.
    """
    out = q_r.new_empty(*q_r.shape[:3], k_t.shape[3])
    for b in range(k_t.shape[0]):
        for h in range(k_t.shape[1]):
            torch.matmul(q_r[b, h], _rows(k_t[b, h], channels[b, h]).to(q_r.dtype), out=out[b, h])
    return out


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x[index], selected in the order in which x lies in memory: three times faster for a transposed matrix."""
    return x.index_select(0, index) if x.stride(1) == 1 else x.mT.index_select(1, index).mT


def logit_scale(q: Tensor, q_r: Tensor, scale: float) -> Tensor:
    """(..., 1): what multiplies q_r . K_r so that it stands for scale * q . K; 0 where q_r is zero."""
    whole, part = (x.abs().sum(dim=-1, keepdim=True) for x in (q, q_r))
    return torch.where(part > 0, scale * (whole / part).sqrt(), 0.0)


def choose_positions(scores: Tensor, topk: int, local: int, kept: Tensor | None) -> Tensor:
    """(B, Hkv, topk) int64, ascending: the largest sums of `scores` over the group, the last `local` kept forced in.

    Forcing after the sum is the same choice as the paper's forcing before it: either way a local position outranks
    every other and no other sum changes; after the sum, infinity needs no headroom. Positions that are not kept come
    last: they are chosen only when fewer than topk are kept.
    """
    weight = scores.sum(dim=2)
    index = torch.arange(weight.shape[-1], device=weight.device)
    if kept is None:
        return top_indices(weight.masked_fill(index >= weight.shape[-1] - local, torch.inf), topk)
    is_local = index >= local_start(kept, local)[:, None]
    weight = weight.masked_fill(is_local[:, None], torch.inf).masked_fill(~kept[:, None], -1.0)
    return top_indices(weight, topk)


def attend(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, scale: float, kept: Tensor | None
) -> Tensor:
    """(B, Hkv, G, Dv): exact attention over `positions` (B, Hkv, n), or over all of them when None.

    A position that is not kept has no weight, whatever its key and value hold; with none kept the row is zero.
    """
    if positions is not None:
        k, v = take_rows(k, positions), take_rows(v, positions)
    seen = kept_at(kept, positions)
    logits = scale * (q @ k.to(q.dtype).transpose(-1, -2))
    v = v if seen is None else v.masked_fill(~seen[..., None], 0.0)
    return masked_softmax(logits, seen) @ v.to(q.dtype)


def covered_mass(scores: Tensor, positions: Tensor, kept: Tensor | None) -> Tensor:
    """(B, Hkv, G, 1): alpha, the approximate probability of the chosen positions; exactly 1 when none is left out."""
    mass = scores.gather(-1, positions[:, :, None].expand(*scores.shape[:3], -1)).sum(dim=-1, keepdim=True)
    if kept is None:
        return mass
    whole = kept.sum(dim=-1) <= positions.shape[-1]
    return mass.masked_fill(whole[:, None, None, None], 1.0)


def mean_of_values(request: Request) -> Tensor:
    """(B, Hkv, Dv), fp32 or better: mean value over the kept positions, as given or computed here (reads all of v)."""
    dtype = accumulator(request.q.dtype)
    if request.v_mean is not None:
        return request.v_mean.to(dtype)
    if request.kept is None:
        return request.v.mean(dim=2, dtype=dtype)
    total = request.v.masked_fill(~request.kept[:, None, :, None], 0.0).sum(dim=2, dtype=dtype)
    return total / request.kept.sum(dim=-1).clamp_min(1)[:, None, None]


def local_start(kept: Tensor, local: int) -> Tensor:
    """(B,) int64: the first position from which at most `local` kept ones remain."""
    remaining = kept.flip(-1).cumsum(dim=-1)
    return (remaining > local).sum(dim=-1)


def kept_at(kept: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """`kept` (B, Sk) at `positions` (B, Hkv, n), or at all of them as (B, 1, Sk)."""
    if kept is None or positions is None:
        return kept if kept is None else kept[:, None]
    return kept[:, None].expand(-1, positions.shape[1], -1).gather(-1, positions)


def masked_softmax(logits: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax of logits (B, Hkv, G, n) over the positions in `seen` (B, 1 or Hkv, n); zero at the others."""
    if seen is None:
        return logits.softmax(dim=-1)
    hidden = ~seen[:, :, None]
    return logits.masked_fill(hidden, -torch.inf).softmax(dim=-1).masked_fill(hidden, 0.0)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x[b, h, rows[b, h]]: (B, Hkv, n, width) from x (B, Hkv, N, width) and rows (B, Hkv, n)."""
    batch = torch.arange(x.shape[0], device=x.device)[:, None, None]
    head = torch.arange(x.shape[1], device=x.device)[:, None]
    return x[batch, head, rows]


def top_indices(values: Tensor, count: int) -> Tensor:
    """Indices, ascending, of the `count` largest along the last dimension; among equals the lower index wins.

    torch.topk promises no order among equals (https://github.com/pytorch/pytorch/issues/127196), so fp32 values
    become unique integers first: the bits of a float that is not negative grow with it, and its index fills the
    low half. A negative value only has to come after all others.
    """
    if values.dtype != torch.float32:
        return values.sort(dim=-1, descending=True, stable=True).indices[..., :count].sort(dim=-1).values
    index = torch.arange(values.shape[-1], device=values.device)
    keys = (values.view(torch.int32).to(torch.int64) << 32) | (LAST - index)
    return keys.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
