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
from attnopt.kernels.sparq.triton_row import _row_logits
from attnopt.kernels.sparq.triton_select import (
    Weights,
    first_local,
    new_empty_int,
    range_of,
    rank_of,
    store_best,
)
from attnopt.kernels.sparq.triton_start import Start, channels_for, start_group, strides_of


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """logits (P, G, Sk) fp32 in base 2, -inf where not kept; part_max, part_sum (P, splits, G) of their softmax.

    ticket (P,) int32: zeros, where the programs that weigh positions are to find out which of them is the last.
    """

    logits: Tensor
    part_max: Tensor
    part_sum: Tensor
    ticket: Tensor | None = None


def row_logits(request: Request, chosen: Start, tiles: Tiles) -> tuple[Scores, Weights]:
    """Launches (groups, splits): what one head's logits are; they order its positions as their softmax does."""
    k_t, kept, block = request.keys_by_channel, request.kept, min(tiles.row_block, tiles.split)
    scores, weights = _new_scores(request, tiles), new_weights(request, tiles)
    (groups, _, sk), splits = scores.logits.shape, scores.part_max.shape[1]
    weights = replace(weights, weight=scores.logits.view(groups, sk))
    own = channels_for(request, chosen, splits)
    _row_logits[(groups, splits)](
        *own.pointers, *own.arguments, k_t, as_bytes(kept), request.starts, request.lengths, weights.local,
        scores.logits, weights.best, scores.part_max, scores.part_sum,
        *k_t.stride(), *strides_of(kept, 2),
        k_t.shape[1], request.channels, sk, weights.best.shape[1], tiles.split, request.local, request.grown,
        **own.sizes, ROWS=8, STAGES=tiles.row_stages, BLOCK=block, RUN=tiles.run,
        **ordered(early=tiles.early), num_warps=max(1, min(4, block // 256)),
    )  # fmt: skip
    return scores, weights


def approximate_logits(request: Request, chosen: Start, tiles: Tiles) -> Scores:
    """Launches (groups, splits): the logits of the chosen channels, and the softmax's maximum and sum of each split."""
    k_t, kept, group, rank = request.keys_by_channel, request.kept, request.group, request.channels
    out = _new_scores(request, tiles)
    own = channels_for(request, chosen, out.part_max.shape[1])
    _logits[(len(out.logits), out.part_max.shape[1])](
        *own.pointers, *own.arguments, k_t, as_bytes(kept), request.starts, request.lengths,
        out.logits, out.part_max, out.part_sum, out.ticket,
        *k_t.stride(), *strides_of(kept, 2),
        k_t.shape[1], group, rank, k_t.shape[3], tiles.split, request.grown,
        **own.sizes, HAS_KEPT=kept is not None, G_PAD=next_power_of_two(group), R_PAD=next_power_of_two(rank),
        BLOCK=tiles.block, PRECISION=dot_precision(request.q.dtype), **ordered(early=tiles.early),
    )  # fmt: skip
    return out


def group_weights(request: Request, scores: Scores, tiles: Tiles) -> Weights:
    """Launches (groups, tiles): the softmax of each head, summed over the group, and the best of each run."""
    groups, _, sk = scores.logits.shape
    out = replace(new_weights(request, tiles), weight=scores.logits.new_empty(groups, sk))
    splits = scores.part_max.shape[1]
    _weights[(groups, triton.cdiv(sk, tiles.weight_block))](
        scores.logits, scores.part_max, scores.part_sum, as_bytes(request.kept), request.starts, request.lengths,
        out.local, out.weight, out.best, *strides_of(request.kept, 2),
        request.k.shape[1], request.group, sk, out.best.shape[1], splits, request.local, request.grown,
        G_PAD=triton.next_power_of_2(request.group), SPLITS_PAD=triton.next_power_of_2(splits),
        BLOCK=tiles.weight_block, RUN=tiles.run, **ordered(early=tiles.early),
    )  # fmt: skip
    return out


def _new_scores(request: Request, tiles: Tiles) -> Scores:
    batch, kv_heads, sk, _ = request.k.shape
    groups, group, splits = batch * kv_heads, request.group, triton.cdiv(sk, tiles.split)
    fp32 = request.q.new_empty(0, dtype=torch.float32).new_empty
    ticket = new_empty_int(request.k, groups) if tiles.ticket else None
    return Scores(fp32(groups, group, sk), fp32(groups, splits, group), fp32(groups, splits, group), ticket)


def new_weights(request: Request, tiles: Tiles) -> Weights:
    """Room for the best of each run; the weights themselves are put in by the caller."""
    (batch, kv_heads, sk, _), kept = request.k.shape, request.kept
    best = new_empty_int(request.k, batch * kv_heads, triton.cdiv(sk, tiles.run))
    return Weights(best, best, None if kept is None else steps.local_start(kept, request.local))


def as_bytes(kept: Tensor | None) -> Tensor | None:
    """The mask as kernels load it: a uint8 view."""
    return None if kept is None else kept.view(torch.uint8)


@triton.jit
def _logits(
    index_ptr, queries_ptr, heat_ptr,
    q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, akt_ptr, mean_ptr,
    q_sb, q_sh, q_sd, scale, nk_sb, nk_sh, nk_sd, nv_sb, nv_sh, nv_sd,
    k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, akt_sb, akt_sh, akt_sd, akt_sn, mean_sb, mean_sh, mean_sd, d, dv,
    kt_ptr, kept_ptr, starts_ptr, lengths_ptr, logits_ptr, max_ptr, sum_ptr, ticket_ptr,
    kt_sb, kt_sh, kt_sd, kt_sn, kept_sb, kept_sn,
    kv_heads, group, rank, sk, split, grown,
    HAS_KEPT: tl.constexpr, G_PAD: tl.constexpr, R_PAD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    HEADS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, OWN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (p, s): logits of group p at the positions of split s, and the maximum and sum of their softmax."""
    await_launch(EARLY)
    pid, part = tl.program_id(0), tl.program_id(1)
    b, h = pid // kv_heads, pid % kv_heads
    g, r = tl.arange(0, G_PAD), tl.arange(0, R_PAD)
    if ticket_ptr is not None:
        tl.store(ticket_ptr + pid, 0, mask=part == 0)
    mine = pid
    if OWN:
        start_group(
            index_ptr, queries_ptr, heat_ptr,
            q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, akt_ptr, mean_ptr,
            q_sb, q_sh, q_sd, scale, nk_sb, nk_sh, nk_sd, nv_sb, nv_sh, nv_sd,
            k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, akt_sb, akt_sh, akt_sd, akt_sn, mean_sb, mean_sh, mean_sd,
            d, dv, starts_ptr, lengths_ptr, kv_heads, group, sk, rank, pid, part, tl.num_programs(1), split,
            HEADS, D_PAD, DV_PAD,
        )  # fmt: skip
        mine = pid * tl.num_programs(1) + part
        tl.debug_barrier()  # what other threads of this program stored is read next
    row = offset(pid, group) + g
    q = tl.load(
        queries_ptr + offset(offset(mine, group) + g, rank)[:, None] + r[None, :],
        mask=(g < group)[:, None] & (r < rank)[None, :], other=0.0,
    )  # fmt: skip
    heat = tl.load(heat_ptr + offset(mine, group) + g, mask=g < group, other=0.0)
    channel = tl.load(index_ptr + offset(mine, rank) + r, mask=r < rank, other=0)
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
    """Program (p, j): weights of one tile of positions."""
    await_launch(EARLY)
    weigh(
        logits_ptr, max_ptr, sum_ptr, kept_ptr, starts_ptr, lengths_ptr, local_ptr, weight_ptr, best_ptr,
        kept_sb, kept_sn, tl.program_id(0), tl.program_id(1),
        kv_heads, group, sk, runs, splits, local, grown, G_PAD, SPLITS_PAD, BLOCK, RUN,
    )  # fmt: skip


@triton.jit
def weigh(
    logits_ptr, max_ptr, sum_ptr, kept_ptr, starts_ptr, lengths_ptr, local_ptr, weight_ptr, best_ptr,
    kept_sb, kept_sn, pid, tile,
    kv_heads, group, sk, runs, splits, local, grown,
    G_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Weights of one tile of positions of group `pid`. Each head's softmax comes before the sum over the group."""
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
