"""The first half of SparQ decoding in Triton: which channels, their logits, and a key that orders the positions.

Working layouts, with P = B * Hkv groups of G heads: channels (P, r), logits (P, G, Sk) in base 2, keys (P, Sk).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels._triton import dot, dot_precision, next_power_of_two, offset
from attnopt.kernels.sparq import steps
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import Tiles

LOG2E = tl.constexpr(1.4426950408889634)
#: Subtracted from, a position becomes the low half of a key: the lower index then has the larger key.
LAST = tl.constexpr(2**31 - 1)


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


def choose_channels(request: Request) -> Channels:
    """Launches one program per group: the channels with the largest |q| summed over the group."""
    q, rank, group = request.q, request.channels, request.group
    groups = request.k.shape[0] * request.k.shape[1]
    out = Channels(
        q.new_empty(groups, rank, dtype=torch.int32),
        q.new_empty(groups, group, rank),
        q.new_empty(groups, group, dtype=torch.float32),
    )
    d_pad = next_power_of_two(q.shape[3])
    _channels[(groups,)](
        q, out.index, out.queries, out.heat,
        q.stride(0), q.stride(1), q.stride(3), request.scale,
        request.k.shape[1], group, q.shape[3], rank,
        G_PAD=next_power_of_two(group), D_PAD=d_pad,
        num_warps=4 if d_pad <= 128 else 8,
    )  # fmt: skip
    return out


def approximate_logits(request: Request, chosen: Channels, tiles: Tiles) -> Scores:
    """Launches (groups, splits): the logits of the chosen channels, and the softmax's maximum and sum of each split."""
    k_t, kept, (groups, group) = request.keys_by_channel, request.kept, chosen.heat.shape
    sk, rank = k_t.shape[3], chosen.index.shape[1]
    splits = triton.cdiv(sk, tiles.split)
    out = Scores(
        *(chosen.heat.new_empty(groups, *rest) for rest in ((group, sk), (splits, group), (splits, group)))
    )
    _logits[(groups, splits)](
        chosen.queries, chosen.index, chosen.heat, k_t, as_bytes(kept), out.logits, out.part_max, out.part_sum,
        *k_t.stride(), *strides_of(kept, 2),
        k_t.shape[1], group, rank, sk, tiles.split,
        HAS_KEPT=kept is not None, G_PAD=next_power_of_two(group), R_PAD=next_power_of_two(rank),
        BLOCK=tiles.block, PRECISION=dot_precision(request.q.dtype),
    )  # fmt: skip
    return out


def group_keys(request: Request, scores: Scores, tiles: Tiles) -> Tensor:
    """(P, Sk) int64, all different: larger for a larger group score, and among equals for the lower position."""
    kept, (groups, group, sk) = request.kept, scores.logits.shape
    keys = scores.logits.new_empty(groups, sk, dtype=torch.int64)
    start = None if kept is None else steps.local_start(kept, request.local)
    splits = scores.part_max.shape[1]
    _keys[(groups, triton.cdiv(sk, tiles.key_block))](
        scores.logits, scores.part_max, scores.part_sum, as_bytes(kept), start, keys,
        *strides_of(kept, 2),
        request.k.shape[1], group, sk, splits, sk - request.local,
        HAS_KEPT=kept is not None, G_PAD=triton.next_power_of_2(group), SPLITS_PAD=triton.next_power_of_2(splits),
        BLOCK=tiles.key_block,
    )  # fmt: skip
    return keys


def as_bytes(kept: Tensor | None) -> Tensor | None:
    """The mask as kernels load it: a uint8 view."""
    return None if kept is None else kept.view(torch.uint8)


def strides_of(x: Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides of x, or zeros for an absent tensor of this rank."""
    return (0,) * rank if x is None else x.stride()


@triton.jit
def _channels(
    q_ptr, index_ptr, queries_ptr, heat_ptr,
    q_sb, q_sh, q_sd, scale,
    kv_heads, group, d, rank,
    G_PAD: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Program p: ranks the D channels of group p by comparing all pairs, and packs the first r in ascending order."""
    pid = tl.program_id(0)
    b, h = pid // kv_heads, pid % kv_heads
    g, c = tl.arange(0, G_PAD), tl.arange(0, D_PAD)
    there = (g < group)[:, None] & (c < d)[None, :]
    at = offset(b, q_sb) + offset(h * group + g, q_sh)[:, None] + offset(c, q_sd)[None, :]
    q = tl.load(q_ptr + at, mask=there, other=0.0)
    size = tl.abs(q.to(tl.float32))

    # A NaN would compare as neither larger nor equal and leave holes in the ranking: it counts as infinite.
    weight = tl.sum(size, axis=0)
    weight = tl.where(weight == weight, weight, float("inf"))
    weight = tl.where(c < d, weight, -1.0)
    mine, other = weight[None, :], weight[:, None]
    ahead = (other > mine) | ((other == mine) & (c[:, None] < c[None, :]))
    chosen = tl.sum(ahead.to(tl.int32), axis=0) < rank
    slot = tl.cumsum(chosen.to(tl.int32), axis=0) - 1

    tl.store(index_ptr + offset(pid, rank) + slot, c, mask=chosen)
    row = offset(pid, group) + g
    tl.store(queries_ptr + offset(row, rank)[:, None] + slot[None, :], q, mask=there & chosen[None, :])
    whole = tl.sum(size, axis=1)
    part = tl.sum(tl.where(chosen[None, :], size, 0.0), axis=1)
    heat = scale * LOG2E * tl.sqrt(whole / tl.where(part > 0, part, 1.0))
    tl.store(heat_ptr + row, tl.where(part > 0, heat, 0.0), mask=g < group)


@triton.jit
def _logits(
    queries_ptr, index_ptr, heat_ptr, kt_ptr, kept_ptr, logits_ptr, max_ptr, sum_ptr,
    kt_sb, kt_sh, kt_sd, kt_sn, kept_sb, kept_sn,
    kv_heads, group, rank, sk, split,
    HAS_KEPT: tl.constexpr, G_PAD: tl.constexpr, R_PAD: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (p, s): logits of group p at the positions of split s, and the maximum and sum of their softmax."""
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
    for start in range(0, split, BLOCK):
        pos = part * split + start + tl.arange(0, BLOCK)
        inside = pos < sk
        k = tl.load(
            kt_row + offset(pos, kt_sn)[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0
        )
        s = dot(q, k, PRECISION) * heat[:, None]
        # The mask comes after the keys: they need not wait for it, and what padded ones hold is overwritten here.
        seen = inside
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
def _keys(
    logits_ptr, max_ptr, sum_ptr, kept_ptr, start_ptr, keys_ptr,
    kept_sb, kept_sn,
    kv_heads, group, sk, splits, local_start,
    HAS_KEPT: tl.constexpr, G_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (p, j): keys of one tile of positions. The softmax of each head comes before the sum over the group."""
    pid = tl.program_id(0)
    b = pid // kv_heads
    g, pos = tl.arange(0, G_PAD), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    base, total = softmax_of_splits(max_ptr, sum_ptr, pid, group, splits, G_PAD, SPLITS_PAD)
    s = tl.load(
        logits_ptr + offset(offset(pid, group) + g, sk)[:, None] + pos[None, :],
        mask=(g < group)[:, None] & (pos < sk)[None, :], other=float("-inf"),
    )  # fmt: skip
    weight = tl.sum(tl.exp2(s - base[:, None]) / total[:, None], axis=0)
    if HAS_KEPT:
        seen = tl.load(kept_ptr + offset(b, kept_sb) + offset(pos, kept_sn), mask=pos < sk, other=0) != 0
        weight = tl.where(pos >= tl.load(start_ptr + b), float("inf"), weight)
        weight = tl.where(seen, weight, -1.0)
    else:
        weight = tl.where(pos >= local_start, float("inf"), weight)
    # The bits of a float that is not negative grow with it; the position in the low half makes the keys unique.
    key = (weight.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (LAST - pos.to(tl.int64))
    tl.store(keys_ptr + offset(pid, sk) + pos, key, mask=pos < sk)
