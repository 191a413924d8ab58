"""Weights of heads that share keys, without their logits in memory: bounds of each run, and what they leave open.

A position's weight is the sum over the group of the heads' softmax, and a head's softmax is known only when all its
logits are. So the first launch keeps, of each run of neighbours, the largest logit of every head, and the largest sum
of weights in which each head's softmax is that of its split up to this tile (exp2 of `tile_scale` less than it will
be). Both bound the largest weight of the run, a in the head with the largest, f between the least and the most of the
heads' factors exp2(tile_scale - log2(sum of the head)):

    max(a_1 .. a_G)      <= largest weight <= a_1 + .. + a_G
    min(f_1 .. f_G) * s  <= largest weight <= max(f_1 .. f_G) * s

The topk-th largest of the lower bounds of tiles is a bar that topk positions reach. The second launch computes the
logits once more where the upper bound of a run reaches it. A key in the range that is infinite makes every bound of its
group a NaN: then all runs are open.
"""

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels._triton import await_launch, dot, dot_precision, next_power_of_two, offset
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import Tiles, ordered
from attnopt.kernels.sparq.triton_score import new_weights, softmax_of_splits
from attnopt.kernels.sparq.triton_select import (
    NEVER,
    Weights,
    bar_of,
    new_empty_int,
    range_of,
    rank_of,
)
from attnopt.kernels.sparq.triton_start import Channels

#: The bar is so much lower than found: two computations of a logit may differ by rounding.
SLACK = tl.constexpr(1.0 - 2.0**-8)
#: A bar below this is none: exponentials that small are rounded to nothing.
LEAST_BAR = tl.constexpr(2.0**-100)
#: Rows of keys, of all tiles that are multiplied at once.
MOST_CHANNELS = 128
#: Runs whose bounds are looked at together, and positions that are computed together.
RUNS_AT_ONCE, POSITIONS_AT_ONCE = 256, 256


@dataclass(frozen=True, slots=True, eq=False)
class Bounds:
    """Of runs: best (P, runs, G), the largest logits in base 2; mixed (P, runs), the largest sum of weights so far.

    Of tiles the same, and tile_scale (P, tiles, G), log2 of each head's sum in its split so far. part_max, part_sum
    (P, splits, G) as in `Scores`. All fp32, unwritten where no position counts.
    """

    best: Tensor
    mixed: Tensor
    tile_best: Tensor
    tile_mixed: Tensor
    tile_scale: Tensor
    part_max: Tensor
    part_sum: Tensor

    @staticmethod
    def of(heat: Tensor, sk: int, tiles: Tiles) -> "Bounds":
        """Room for what the first launch writes."""
        (groups, group), new = heat.shape, heat.new_empty
        runs, blocks, splits = (triton.cdiv(sk, size) for size in (tiles.run, tiles.block, tiles.bound_split))
        return Bounds(
            new(groups, runs, group), new(groups, runs),
            new(groups, blocks, group), new(groups, blocks), new(groups, blocks, group),
            new(groups, splits, group), new(groups, splits, group),
        )  # fmt: skip


def bound_runs(request: Request, chosen: Channels, tiles: Tiles) -> Bounds:
    """Launches (groups, splits): the bounds of all runs, and the softmax's maximum and sum of each split."""
    k_t, group, rank = request.keys_by_channel, request.group, chosen.index.shape[1]
    out, heads = Bounds.of(chosen.heat, k_t.shape[3], tiles), triton.next_power_of_2(group)
    rank_pad, rows = next_power_of_two(rank), next_power_of_two(group)
    stripes = min(rows // heads, MOST_CHANNELS // rank_pad, tiles.bound_split // tiles.block)
    _bounds[(len(chosen.heat), out.part_max.shape[1])](
        chosen.queries, chosen.index, chosen.heat, k_t, request.starts, request.lengths,
        out.best, out.mixed, out.tile_best, out.tile_mixed, out.tile_scale, out.part_max, out.part_sum,
        *k_t.stride(), k_t.shape[1], group, rank, k_t.shape[3], out.best.shape[1], out.tile_best.shape[1],
        tiles.bound_split, request.grown,
        ROWS=rows, HEADS=heads, STRIPES=max(1, stripes) if k_t.itemsize < 4 else 1, R_PAD=rank_pad,
        BLOCK=tiles.block, RUN=tiles.run, PRECISION=dot_precision(request.q.dtype), **ordered(early=tiles.early),
    )  # fmt: skip
    return out


def bounded_weights(request: Request, chosen: Channels, bounds: Bounds, tiles: Tiles) -> Weights:
    """Launches (groups, parts): the weights of the runs that may hold a chosen position; no other run is there."""
    k_t, group, rank = request.keys_by_channel, request.group, chosen.index.shape[1]
    groups, sk, blocks = len(chosen.heat), k_t.shape[3], bounds.tile_best.shape[1]
    out, splits, heads = new_weights(request, tiles), bounds.part_max.shape[1], triton.next_power_of_2(group)
    out = replace(out, weight=chosen.heat.new_empty(groups, sk))
    at_once, blocks_pad = max(1, POSITIONS_AT_ONCE // tiles.run), triton.next_power_of_2(blocks)
    parts, runs = triton.cdiv(sk, tiles.open_split), triton.cdiv(tiles.open_split, tiles.run)
    _open_weights[(groups, parts)](
        chosen.queries, chosen.index, chosen.heat, k_t, request.starts, request.lengths,
        bounds.best, bounds.mixed, bounds.tile_best, bounds.tile_mixed, bounds.tile_scale,
        bounds.part_max, bounds.part_sum,
        new_empty_int(out.best, groups, parts, runs), out.weight, out.best,
        *k_t.stride(), k_t.shape[1], group, rank, sk, out.best.shape[1], blocks, splits, tiles.open_split,
        request.topk, request.local, request.grown,
        G_PAD=next_power_of_two(group), R_PAD=next_power_of_two(rank), HEADS=heads,
        BLOCKS_PAD=blocks_pad, SPLITS_PAD=triton.next_power_of_2(splits), BLOCK=tiles.block, RUN=tiles.run,
        RUNS=min(RUNS_AT_ONCE, runs), OPEN=at_once,
        PRECISION=dot_precision(request.q.dtype), **ordered(early=tiles.early),
        num_warps=8 if blocks_pad * heads > 4096 else 4,
    )  # fmt: skip
    return out


@triton.jit
def _bounds(
    queries_ptr, index_ptr, heat_ptr, kt_ptr, starts_ptr, lengths_ptr,
    best_ptr, mixed_ptr, tile_best_ptr, tile_mixed_ptr, tile_scale_ptr, max_ptr, sum_ptr,
    kt_sb, kt_sh, kt_sd, kt_sn,
    kv_heads, group, rank, sk, runs, blocks, split, grown,
    ROWS: tl.constexpr, HEADS: tl.constexpr, STRIPES: tl.constexpr, R_PAD: tl.constexpr,
    BLOCK: tl.constexpr, RUN: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (p, s): bounds of the runs and tiles of group p in split s, the maximum and sum of their softmax.

    Tensor cores want 16 rows, and few heads share keys. So the rows are those of STRIPES tiles side by side, each with
    its own keys under those of the others: queries [q 0; 0 q] times keys [k of tile 0; k of tile 1].
    """
    await_launch(EARLY)
    pid, part = tl.program_id(0), tl.program_id(1)
    b, h = pid // kv_heads, pid % kv_heads
    m, c = tl.arange(0, ROWS), tl.arange(0, STRIPES * R_PAD)
    g, stripe, r, below = m % HEADS, m // HEADS, c % R_PAD, c // R_PAD
    is_row = (g < group) & (stripe < STRIPES)
    row = offset(pid, group) + g
    q = tl.load(
        queries_ptr + offset(row, rank)[:, None] + r[None, :],
        mask=is_row[:, None] & (stripe[:, None] == below[None, :]) & (r < rank)[None, :], other=0.0,
    )  # fmt: skip
    heat = tl.load(heat_ptr + row, mask=is_row, other=0.0)
    channel = tl.load(index_ptr + offset(pid, rank) + r, mask=r < rank, other=0)
    kt_row = (
        kt_ptr + offset(b, kt_sb) + offset(h, kt_sh) + offset(channel, kt_sd) + offset(below * BLOCK, kt_sn)
    )
    first, last = range_of(starts_ptr, lengths_ptr, b, sk, grown)
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    n, there = tl.arange(0, BLOCK), (r < rank)[:, None]

    TILE: tl.constexpr = STRIPES * BLOCK
    begin, end = part * split, (part + 1) * split
    for start in range(
        tl.maximum(begin, tl.cdiv(first, TILE) * TILE), tl.minimum(end, last // TILE * TILE), TILE
    ):
        k = tl.load(kt_row[:, None] + offset(start + n, kt_sn)[None, :], mask=there, other=0.0)
        s = dot(q, k, PRECISION) * heat[:, None]
        top, total = _bound_tile(
            s, top, total, is_row, g, stripe, best_ptr, mixed_ptr, tile_best_ptr, tile_mixed_ptr, tile_scale_ptr,
            pid, group, start, runs, blocks, ROWS, HEADS, STRIPES, BLOCK, RUN,
        )  # fmt: skip
    # Tiles that count in part, at most two: what they hold elsewhere may be anything, and zero times that too.
    for at_end in tl.static_range(2):
        start = (last if at_end else first) // TILE * TILE
        is_cut = (start >= begin) & (start < end) & ((last if at_end else first) % TILE > 0)
        if at_end:
            is_cut &= (start != first // TILE * TILE) | (first % TILE == 0)
        if is_cut:
            pos = start + offset(below, BLOCK)[:, None] + n[None, :]
            counts = there & (pos >= first) & (pos < last)
            k = tl.load(kt_row[:, None] + offset(start + n, kt_sn)[None, :], mask=counts, other=0.0)
            mine = start + (stripe * BLOCK)[:, None] + n[None, :]
            s = tl.where((mine >= first) & (mine < last), dot(q, k, PRECISION) * heat[:, None], float("-inf"))
            top, total = _bound_tile(
                s, top, total, is_row, g, stripe, best_ptr, mixed_ptr, tile_best_ptr, tile_mixed_ptr, tile_scale_ptr,
                pid, group, start, runs, blocks, ROWS, HEADS, STRIPES, BLOCK, RUN,
            )  # fmt: skip

    tops = tl.reshape(tl.where(is_row, top, float("-inf")), (ROWS // HEADS, HEADS))
    sums = tl.reshape(tl.where(is_row, total, 0.0), (ROWS // HEADS, HEADS))
    top = tl.max(tops, axis=0)
    base = tl.where(top == float("-inf"), 0.0, top)
    head = tl.arange(0, HEADS)
    at = offset(pid * tl.num_programs(1) + part, group) + head
    tl.store(max_ptr + at, top, mask=head < group)
    tl.store(sum_ptr + at, tl.sum(sums * tl.exp2(tops - base[None, :]), axis=0), mask=head < group)


@triton.jit
def _bound_tile(
    s, top, total, is_row, g, stripe, best_ptr, mixed_ptr, tile_best_ptr, tile_mixed_ptr, tile_scale_ptr,
    pid, group, start, runs, blocks,
    ROWS: tl.constexpr, HEADS: tl.constexpr, STRIPES: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """Stores the bounds of STRIPES tiles from `start` with logits s; the maximum and sum of each row with them."""
    best = tl.max(tl.reshape(s, (ROWS, BLOCK // RUN, RUN)), axis=2)
    tile_best = tl.max(best, axis=1)
    new = tl.maximum(top, tile_best)
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(s - base[:, None])
    total = total * tl.exp2(top - base) + tl.sum(p, axis=1)
    some = tl.where(total == 0.0, 1.0, total)
    share = tl.where(is_row, 1.0 / some, 0.0)
    mixed = tl.sum(tl.reshape(p * share[:, None], (ROWS // HEADS, HEADS, BLOCK)), axis=1)
    mixed = tl.max(tl.reshape(mixed, (ROWS // HEADS, BLOCK // RUN, RUN)), axis=2)
    scale = tl.where(total == 0.0, float("-inf"), base + tl.log2(some))

    tile, run = start // BLOCK, start // RUN + tl.arange(0, BLOCK // RUN)
    at = offset(pid, blocks) + tile + stripe
    is_there = is_row & (tile + stripe < blocks)
    tl.store(tile_best_ptr + at * group + g, tile_best, mask=is_there)
    tl.store(tile_scale_ptr + at * group + g, scale, mask=is_there)
    mine = stripe[:, None] * (BLOCK // RUN) + run[None, :]
    tl.store(
        best_ptr + offset(offset(pid, runs) + mine, group) + g[:, None], best,
        mask=is_row[:, None] & (mine < runs),
    )  # fmt: skip
    stripe = tl.arange(0, ROWS // HEADS)
    mine = stripe[:, None] * (BLOCK // RUN) + run[None, :]
    tl.store(mixed_ptr + offset(pid, runs) + mine, mixed, mask=(stripe < STRIPES)[:, None] & (mine < runs))
    tl.store(
        tile_mixed_ptr + offset(pid, blocks) + tile + stripe, tl.max(mixed, axis=1),
        mask=(stripe < STRIPES) & (tile + stripe < blocks),
    )  # fmt: skip
    return new, total


@triton.jit
def _operands(queries_ptr, index_ptr, heat_ptr, kt_head, kt_sd, pid, group, rank, g, r):
    """Queries (G_PAD, R_PAD), their factor (G_PAD,), and where the chosen rows of keys begin (R_PAD, 1)."""
    row = offset(pid, group) + g
    q = tl.load(
        queries_ptr + offset(row, rank)[:, None] + r[None, :],
        mask=(g < group)[:, None] & (r < rank)[None, :], other=0.0,
    )  # fmt: skip
    heat = tl.load(heat_ptr + row, mask=g < group, other=0.0)
    channel = tl.load(index_ptr + offset(pid, rank) + r, mask=r < rank, other=0)
    return q, heat, kt_head + offset(channel, kt_sd)[:, None]


@triton.jit
def _bar(
    tile_best_ptr, tile_mixed_ptr, tile_scale_ptr, base, total, pid, group, blocks, first, last, topk,
    BLOCKS_PAD: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A weight that at least topk positions of group p reach, each in another tile; 0 where no such is known."""
    g, tile = tl.arange(0, HEADS), tl.arange(0, BLOCKS_PAD)
    counts = (tile < blocks) & (tile * BLOCK < last) & ((tile + 1) * BLOCK > first)
    at, there = offset(pid, blocks) + tile, counts[:, None] & (g < group)[None, :]
    scale = tl.load(tile_scale_ptr + (at * group)[:, None] + g[None, :], mask=there, other=float("inf"))
    best = tl.load(tile_best_ptr + (at * group)[:, None] + g[None, :], mask=there, other=float("-inf"))
    mixed = tl.load(tile_mixed_ptr + at, mask=counts, other=0.0)
    whole = base + tl.log2(total)
    alone = tl.max(tl.exp2(best - base[None, :]) / total[None, :], axis=1)
    shrunk = tl.where(counts, tl.min(tl.exp2(scale - whole[None, :]), axis=1), 0.0) * mixed
    bound = tl.where(counts, tl.maximum(alone, shrunk), 0.0)
    # A NaN is no bound.
    bits = tl.where(bound >= 0.0, bound, 0.0).to(tl.uint32, bitcast=True)
    # A bar that a few more tiles reach is hardly lower, and found sooner.
    return bar_of(bits, topk, topk + topk // 16, 0).to(tl.float32, bitcast=True)


@triton.jit
def _open_weights(
    queries_ptr, index_ptr, heat_ptr, kt_ptr, starts_ptr, lengths_ptr,
    run_best_ptr, mixed_ptr, tile_best_ptr, tile_mixed_ptr, tile_scale_ptr, max_ptr, sum_ptr,
    open_ptr, weight_ptr, best_ptr,
    kt_sb, kt_sh, kt_sd, kt_sn,
    kv_heads, group, rank, sk, runs, blocks, splits, split, topk, local, grown,
    G_PAD: tl.constexpr, R_PAD: tl.constexpr, HEADS: tl.constexpr, BLOCKS_PAD: tl.constexpr,
    SPLITS_PAD: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr, OPEN: tl.constexpr,
    PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (p, s): finds the bar of group p, lists the runs of part s that may reach it, weighs their positions."""
    await_launch(EARLY)
    pid, part = tl.program_id(0), tl.program_id(1)
    b, h = pid // kv_heads, pid % kv_heads
    first, last = range_of(starts_ptr, lengths_ptr, b, sk, grown)
    is_local_from = last - local
    begin, end = tl.maximum(part * split, first), tl.minimum((part + 1) * split, last)
    if (part * split < last) & ((part + 1) * split > first):
        base, total = softmax_of_splits(max_ptr, sum_ptr, pid, group, splits, HEADS, SPLITS_PAD)
        bar = _bar(
            tile_best_ptr, tile_mixed_ptr, tile_scale_ptr, base, total, pid, group, blocks, first, last, topk,
            BLOCKS_PAD, HEADS, BLOCK,
        )  # fmt: skip
        whole = base + tl.log2(total)
        # Where a sum is not a number no bound is one.
        is_bar = (bar >= LEAST_BAR) & (tl.sum(tl.where(whole == whole, 0, 1), axis=0) == 0)
        bar *= SLACK
        open_row, found = open_ptr + offset(pid * tl.num_programs(1) + part, split // RUN), 0
        for at in range(begin // RUN, tl.cdiv(end, RUN), RUNS):
            run = at + tl.arange(0, RUNS)
            counts = run * RUN < end
            reaches = _reaches(
                run_best_ptr, mixed_ptr, tile_scale_ptr, base, total, whole, bar, pid, group, runs, blocks,
                run, run * RUN // BLOCK, counts, HEADS,
            )  # fmt: skip
            # The last positions are chosen whatever they weigh.
            is_open = counts & ((is_bar == 0) | reaches | ((run + 1) * RUN > is_local_from))
            tl.store(best_ptr + offset(pid, runs) + run, NEVER, mask=counts & (is_open == 0))
            place = found + tl.cumsum(is_open.to(tl.int32), axis=0) - 1
            tl.store(open_row + place, run, mask=is_open)
            found += tl.sum(is_open.to(tl.int32), axis=0)
        tl.debug_barrier()  # what other threads of this program stored is read next

        g, r, nth = tl.arange(0, G_PAD), tl.arange(0, R_PAD), tl.arange(0, OPEN * RUN)
        base, total = softmax_of_splits(max_ptr, sum_ptr, pid, group, splits, G_PAD, SPLITS_PAD)
        q, heat, kt_row = _operands(
            queries_ptr, index_ptr, heat_ptr, kt_ptr + offset(b, kt_sb) + offset(h, kt_sh), kt_sd,
            pid, group, rank, g, r,
        )  # fmt: skip
        for at in range(0, found, OPEN):
            mine = tl.load(open_row + at + nth // RUN, mask=at + nth // RUN < found, other=-1)
            pos = mine * RUN + nth % RUN
            inside = (mine >= 0) & (pos < sk)
            k = tl.load(
                kt_row + offset(pos, kt_sn)[None, :], mask=(r < rank)[:, None] & inside[None, :], other=0.0,
            )  # fmt: skip
            s = dot(q, k, PRECISION) * heat[:, None]
            seen = inside & (pos >= first) & (pos < last)
            s = tl.where(seen[None, :] & (g < group)[:, None], s, float("-inf"))
            weight = tl.sum(tl.exp2(s - base[:, None]) / total[:, None], axis=0)
            weight = tl.where(seen, weight, float("-inf"))
            tl.store(weight_ptr + offset(pid, sk) + pos, weight, mask=inside)
            best = tl.max(tl.reshape(rank_of(weight, pos >= is_local_from), (OPEN, RUN)), axis=1)
            nth_run = at + tl.arange(0, OPEN)
            run = tl.load(open_row + nth_run, mask=nth_run < found, other=0)
            tl.store(best_ptr + offset(pid, runs) + run, best, mask=nth_run < found)


@triton.jit
def _reaches(
    run_best_ptr, mixed_ptr, tile_scale_ptr, base, total, whole, bar, pid, group, runs, blocks,
    run, tile, counts, HEADS: tl.constexpr,
):  # fmt: skip
    """Whether both upper bounds of each run reach the bar."""
    g = tl.arange(0, HEADS)
    there, at = counts[:, None] & (g < group)[None, :], offset(pid, runs) + run
    best = tl.load(run_best_ptr + (at * group)[:, None] + g[None, :], mask=there, other=float("-inf"))
    apart = tl.sum(tl.exp2(best - base[None, :]) / total[None, :], axis=1)
    scale = tl.load(
        tile_scale_ptr + ((offset(pid, blocks) + tile) * group)[:, None] + g[None, :],
        mask=there, other=float("-inf"),
    )  # fmt: skip
    mixed = tl.load(mixed_ptr + at, mask=counts, other=0.0)
    grown = tl.max(tl.exp2(scale - whole[None, :]), axis=1) * mixed
    return (apart >= bar) & (grown >= bar)
