"""The first half of SparQ decoding in Triton: which channels, their logits, and weights that order the positions.

Working layouts, with P = B * Hkv groups of G heads: channels (P, r), logits (P, G, Sk) in base 2, weights (P, Sk).
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels._triton import await_launch, dot, dot_precision, next_power_of_two, offset
from attnopt.kernels.sparq import steps
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import Tiles, ordered
from attnopt.kernels.sparq.triton_row import _row_logits, append
from attnopt.kernels.sparq.triton_select import (
    Weights,
    bar_of,
    best_of,
    first_local,
    new_empty_int,
    range_of,
    rank_of,
    store_best,
)

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """index (P, r) int32, ascending; queries (P, G, r) in q's dtype; heat (P, G) fp32, log2(e) included."""

    index: Tensor
    queries: Tensor
    heat: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """logits (P, G, Sk) fp32 in base 2, -inf where not kept; part_max, part_sum (P, splits, G) of their softmax."""

    logits: Tensor
    part_max: Tensor
    part_sum: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Token:
    """The key (B, Hkv, 1, D) and value (B, Hkv, 1, Dv) of one position, for the end of the request's buffers."""

    k: Tensor
    v: Tensor


def choose_channels(request: Request, token: Token | None = None, *, early: bool = False) -> Channels:
    """Launches one program per group: the channels with the largest |q| summed over the group.

    The same program appends a token at `lengths`, to both key layouts, the values and their running mean.
    """
    q, rank, group = request.q, request.channels, request.group
    groups = request.k.shape[0] * request.k.shape[1]
    out = Channels(
        q.new_empty(groups, rank, dtype=torch.int32),
        q.new_empty(groups, group, rank),
        q.new_empty(groups, group, dtype=torch.float32),
    )
    d_pad, dv, heads = next_power_of_two(q.shape[3]), request.v.shape[3], triton.next_power_of_2(group)
    k, v, k_t, mean = (request.k, request.v, request.k_t, request.v_mean) if token else (None,) * 4
    _channels[(groups,)](
        q, out.index, out.queries, out.heat,
        token and token.k, token and token.v, k, v, k_t, mean, request.starts, request.lengths,
        q.stride(0), q.stride(1), q.stride(3), request.scale,
        *append_strides(token), *strides_of(k, 4), *strides_of(v, 4), *strides_of(k_t, 4), *strides_of(mean, 3),
        request.k.shape[1], group, q.shape[3], dv, request.k.shape[2], rank,
        G_PAD=heads, D_PAD=d_pad, DV_PAD=next_power_of_two(dv),
        **ordered(early=early), num_warps=min(8, max(1, heads * d_pad // 512)),
    )  # fmt: skip
    return out


def append_strides(token: Token | None) -> tuple[int, ...]:
    """Strides of the new key and value over batch, heads and channels; zeros for none."""
    if token is None:
        return (0,) * 6
    return tuple(x.stride(i) for x in (token.k, token.v) for i in (0, 1, 3))


def row_logits(request: Request, chosen: Channels, tiles: Tiles) -> tuple[Scores, Weights]:
    """Launches (groups, splits): what one head's logits are; they order its positions as their softmax does."""
    k_t, kept, groups = request.keys_by_channel, request.kept, len(chosen.heat)
    sk, split, block = k_t.shape[3], tiles.split, min(tiles.row_block, tiles.split)
    scores, weights = _new_scores(request, chosen, tiles), new_weights(request, tiles)
    weights = replace(weights, weight=scores.logits.view(groups, sk))
    _row_logits[(groups, triton.cdiv(sk, split))](
        chosen.queries, chosen.index, chosen.heat, k_t, as_bytes(kept), request.starts, request.lengths, weights.local,
        scores.logits, weights.best, scores.part_max, scores.part_sum,
        *k_t.stride(), *strides_of(kept, 2),
        k_t.shape[1], chosen.index.shape[1], sk, weights.best.shape[1], split, request.local, request.grown,
        ROWS=8, STAGES=tiles.row_stages, BLOCK=block, RUN=tiles.run,
        **ordered(early=tiles.early), num_warps=max(1, min(4, block // 256)),
    )  # fmt: skip
    return scores, weights


def approximate_logits(request: Request, chosen: Channels, tiles: Tiles) -> Scores:
    """Launches (groups, splits): the logits of the chosen channels, and the softmax's maximum and sum of each split."""
    k_t, kept, group, rank = request.keys_by_channel, request.kept, request.group, chosen.index.shape[1]
    out = _new_scores(request, chosen, tiles)
    _logits[(len(chosen.heat), out.part_max.shape[1])](
        chosen.queries, chosen.index, chosen.heat, k_t, as_bytes(kept), request.starts, request.lengths,
        out.logits, out.part_max, out.part_sum,
        *k_t.stride(), *strides_of(kept, 2),
        k_t.shape[1], group, rank, k_t.shape[3], tiles.split, request.grown,
        HAS_KEPT=kept is not None, G_PAD=next_power_of_two(group), R_PAD=next_power_of_two(rank),
        BLOCK=tiles.block, PRECISION=dot_precision(request.q.dtype), **ordered(early=tiles.early),
    )  # fmt: skip
    return out


def group_weights(request: Request, scores: Scores, tiles: Tiles) -> Weights:
    """Launches (groups, tiles): the softmax of each head, summed over the group, and the best of each run."""
    groups, group, sk = scores.logits.shape
    splits, out = scores.part_max.shape[1], new_weights(request, tiles)
    out = replace(out, weight=scores.logits.new_empty(groups, sk))
    _weights[(groups, triton.cdiv(sk, tiles.weight_block))](
        scores.logits, scores.part_max, scores.part_sum, as_bytes(request.kept), request.starts, request.lengths,
        out.local, out.weight, out.best,
        *strides_of(request.kept, 2),
        request.k.shape[1], group, sk, out.best.shape[1], splits, request.local, request.grown,
        G_PAD=triton.next_power_of_2(group), SPLITS_PAD=triton.next_power_of_2(splits),
        BLOCK=tiles.weight_block, RUN=tiles.run, **ordered(early=tiles.early),
    )  # fmt: skip
    return out


def _new_scores(request: Request, chosen: Channels, tiles: Tiles) -> Scores:
    new, (groups, group), sk = chosen.heat.new_empty, chosen.heat.shape, request.k.shape[2]
    splits = triton.cdiv(sk, tiles.split)
    return Scores(new(groups, group, sk), new(groups, splits, group), new(groups, splits, group))


def new_weights(request: Request, tiles: Tiles) -> Weights:
    """Room for the best of each run; the weights themselves are put in by the caller."""
    (batch, kv_heads, sk, _), kept = request.k.shape, request.kept
    best = new_empty_int(request.k, batch * kv_heads, triton.cdiv(sk, tiles.run))
    return Weights(best, best, None if kept is None else steps.local_start(kept, request.local))


def as_bytes(kept: Tensor | None) -> Tensor | None:
    """The mask as kernels load it: a uint8 view."""
    return None if kept is None else kept.view(torch.uint8)


def strides_of(x: Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides of x, or zeros for an absent tensor of this rank."""
    return (0,) * rank if x is None else x.stride()


@triton.jit
def _channels(
    q_ptr, index_ptr, queries_ptr, heat_ptr,
    new_k_ptr, new_v_ptr, k_ptr, v_ptr, kt_ptr, mean_ptr, starts_ptr, lengths_ptr,
    q_sb, q_sh, q_sd, scale, nk_sb, nk_sh, nk_sd, nv_sb, nv_sh, nv_sd,
    k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, kt_sb, kt_sh, kt_sd, kt_sn, mean_sb, mean_sh, mean_sd,
    kv_heads, group, d, dv, sk, rank,
    G_PAD: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program p: appends to group p; packs its r best channels, ascending, and what they are multiplied by."""
    await_launch(EARLY)
    pid = tl.program_id(0)
    b, h = pid // kv_heads, pid % kv_heads
    if new_k_ptr is not None:
        append(
            new_k_ptr, new_v_ptr, k_ptr, v_ptr, kt_ptr, mean_ptr, starts_ptr, lengths_ptr,
            nk_sb, nk_sh, nk_sd, nv_sb, nv_sh, nv_sd,
            k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, kt_sb, kt_sh, kt_sd, kt_sn, mean_sb, mean_sh, mean_sd,
            b, h, d, dv, sk, D_PAD, DV_PAD,
        )  # fmt: skip
    g, c = tl.arange(0, G_PAD), tl.arange(0, D_PAD)
    there = (g < group)[:, None] & (c < d)[None, :]
    at = offset(b, q_sb) + offset(h * group + g, q_sh)[:, None] + offset(c, q_sd)[None, :]
    q = tl.load(q_ptr + at, mask=there, other=0.0)
    size = tl.abs(q.to(tl.float32))

    # A NaN would have no place in the order: it counts as infinite. What is not there comes after zero.
    weight = tl.sum(size, axis=0)
    weight = tl.where(weight == weight, weight, float("inf"))
    order = tl.where(c < d, weight.to(tl.uint32, bitcast=True) + 1, 0)
    chosen, slot, _ = best_of(order, bar_of(order, rank, rank, 0), rank)

    tl.store(index_ptr + offset(pid, rank) + slot, c, mask=chosen)
    row = offset(pid, group) + g
    tl.store(queries_ptr + offset(row, rank)[:, None] + slot[None, :], q, mask=there & chosen[None, :])
    whole = tl.sum(size, axis=1)
    part = tl.sum(tl.where(chosen[None, :], size, 0.0), axis=1)
    heat = scale * LOG2E * tl.sqrt_rn(tl.div_rn(whole, tl.where(part > 0, part, 1.0)))
    tl.store(heat_ptr + row, tl.where(part > 0, heat, 0.0), mask=g < group)


@triton.jit
def _logits(
    queries_ptr, index_ptr, heat_ptr, kt_ptr, kept_ptr, starts_ptr, lengths_ptr, logits_ptr, max_ptr, sum_ptr,
    kt_sb, kt_sh, kt_sd, kt_sn, kept_sb, kept_sn,
    kv_heads, group, rank, sk, split, grown,
    HAS_KEPT: tl.constexpr, G_PAD: tl.constexpr, R_PAD: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (p, s): logits of group p at the positions of split s, and the maximum and sum of their softmax."""
    await_launch(EARLY)
    pid, part = tl.program_id(0), tl.program_id(1)
    b, h = pid // kv_heads, pid % kv_heads
    g, r = tl.arange(0, G_PAD), tl.arange(0, R_PAD)
    row = offset(pid, group) + g
    q = tl.load(
        queries_ptr + offset(row, rank)[:, None] + r[None, :],
        mask=(g < group)[:, None] & (r < rank)[None, :], other=0.0,
    )  # fmt: skip
    heat = tl.load(heat_ptr + row, mask=g < group, other=0.0)
    channel = tl.load(index_ptr + offset(pid, rank) + r, mask=r < rank, other=0)
    kt_row = kt_ptr + offset(b, kt_sb) + offset(h, kt_sh) + offset(channel, kt_sd)[:, None]

    top = tl.full((G_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    first, last = range_of(starts_ptr, lengths_ptr, b, sk, grown)
    begin = tl.maximum(part * split, first // BLOCK * BLOCK)
    for start in range(begin, tl.minimum((part + 1) * split, last), BLOCK):
        pos = start + tl.arange(0, BLOCK)
        inside = pos < sk
        k = tl.load(
            kt_row + offset(pos, kt_sn)[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        s = dot(q, k, PRECISION) * heat[:, None]
        # The mask comes after the keys: they need not wait for it, and what padded ones hold is overwritten here.
        seen = (pos >= first) & (pos < last)
        if HAS_KEPT:
            seen &= tl.load(kept_ptr + offset(b, kept_sb) + offset(pos, kept_sn), mask=inside, other=0) != 0
        s = tl.where(seen[None, :], s, float("-inf"))
        there = (g < group)[:, None] & inside[None, :]
        tl.store(logits_ptr + offset(row, sk)[:, None] + pos[None, :], s, mask=there)
        new = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), axis=1)
        top = new
    at = offset(pid * tl.num_programs(1) + part, group) + g
    tl.store(max_ptr + at, top, mask=g < group)
    tl.store(sum_ptr + at, total, mask=g < group)


@triton.jit
def softmax_of_splits(max_ptr, sum_ptr, pid, group, splits, G_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr):
    """Maximum and sum (G_PAD,) of each head's softmax over all splits; 0 and 1 where nothing is kept."""
    g, part = tl.arange(0, G_PAD), tl.arange(0, SPLITS_PAD)
    there = (part < splits)[:, None] & (g < group)[None, :]
    at = offset(pid * splits + part, group)[:, None] + g[None, :]
    tops = tl.load(max_ptr + at, mask=there, other=float("-inf"))
    sums = tl.load(sum_ptr + at, mask=there, other=0.0)
    top = tl.max(tops, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(sums * tl.exp2(tops - base[None, :]), axis=0)
    return base, tl.where(total == 0.0, 1.0, total)


@triton.jit
def _weights(
    logits_ptr, max_ptr, sum_ptr, kept_ptr, starts_ptr, lengths_ptr, local_ptr, weight_ptr, best_ptr,
    kept_sb, kept_sn,
    kv_heads, group, sk, runs, splits, local, grown,
    G_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program (p, j): weights of one tile of positions. Each head's softmax comes before the sum over the group."""
    await_launch(EARLY)
    pid, tile = tl.program_id(0), tl.program_id(1)
    b = pid // kv_heads
    first, last = range_of(starts_ptr, lengths_ptr, b, sk, grown)
    if (tile * BLOCK < last) & ((tile + 1) * BLOCK > first):
        g, pos = tl.arange(0, G_PAD), tile * BLOCK + tl.arange(0, BLOCK)
        base, total = softmax_of_splits(max_ptr, sum_ptr, pid, group, splits, G_PAD, SPLITS_PAD)
        seen = (pos >= first) & (pos < last)
        if kept_ptr is not None:
            seen &= tl.load(kept_ptr + offset(b, kept_sb) + offset(pos, kept_sn), mask=pos < sk, other=0) != 0
        s = tl.load(
            logits_ptr + offset(offset(pid, group) + g, sk)[:, None] + pos[None, :],
            mask=(g < group)[:, None] & (pos < sk)[None, :], other=float("-inf"),
        )  # fmt: skip
        weight = tl.sum(tl.exp2(s - base[:, None]) / total[:, None], axis=0)
        weight = tl.where(seen, weight, float("-inf"))
        tl.store(weight_ptr + offset(pid, sk) + pos, weight, mask=pos < sk)
        rank = rank_of(weight, pos >= first_local(local_ptr, b, last, local))
        store_best(best_ptr, rank, pid, runs, tile * BLOCK, BLOCK, RUN)
