"""The best positions without sorting: largest weights of runs first, then the weights of the best runs.

The `topk` largest of Sk weights lie in those `topk` runs of m neighbours whose largest weights are the largest: each
other run is beaten, as a whole, by one weight of each of these. So one program chooses twice, among Sk / m and among
topk * m integers that it holds in registers, by searching the smallest one to be chosen four bits at a time. Among
equals the lower position wins, in runs as in positions, for runs do not overlap. There is nothing atomic in it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels._triton import await_launch, offset
from attnopt.kernels.sparq import steps
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import MOST_CANDIDATES, Tiles, candidates, ordered

#: The rank of a position that is always chosen, and of one that is not there.
ALWAYS = tl.constexpr(2**31 - 1)
NEVER = tl.constexpr(-(2**31))


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """positions (P, topk), ascending, then -1 where fewer are there; there (P,): more than topk, or how many are."""

    positions: Tensor
    there: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """weight (P, Sk) fp32, -inf where not kept; best (P, runs) int32, the largest rank in each run.

    Where no position of a run counts, both may be unwritten. local (B,): where the last positions begin, if there is
    a mask.
    """

    weight: Tensor
    best: Tensor
    local: Tensor | None


def choose_positions(request: Request, weights: Weights, tiles: Tiles) -> Chosen:
    """Launches one program per group. Needs `is_selectable`."""
    choice = Choice.of(request, weights, tiles)
    _select[(len(weights.weight),)](
        *choice.pointers(request, weights), *choice.numbers(request, weights),
        **choice.sizes, **ordered(early=tiles.early), num_warps=choice.warps,
    )  # fmt: skip
    return choice.out


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """What a program needs to choose: where the best runs go, and ranks and positions of the likely ones; for what."""

    runs: Tensor
    narrow: Tensor
    out: Chosen
    sizes: dict[str, int]
    warps: int

    @staticmethod
    def of(request: Request, weights: Weights, tiles: Tiles) -> "Choice":
        """Room for it, in the tiles' sizes."""
        (groups, sk), topk, best = weights.weight.shape, request.topk, weights.best
        widest, k_pad = candidates(sk, topk, tiles.run), triton.next_power_of_2(topk)
        narrow = min(tiles.narrow, k_pad * tiles.run)
        return Choice(
            new_empty_int(best, groups, topk), new_empty_int(best, groups, 2, narrow),
            Chosen(new_empty_int(best, groups, topk), new_empty_int(best, groups)),
            {"RUNS_PAD": triton.next_power_of_2(best.shape[1]), "K_PAD": k_pad, "RUN": tiles.run, "NARROW": narrow},
            min(32 if widest > MOST_CANDIDATES // 2 else 16, max(4, widest // 256)),
        )  # fmt: skip

    def pointers(self, request: Request, weights: Weights) -> tuple[Tensor | None, ...]:
        """Of `select_positions`, in its order."""
        return (
            weights.weight, weights.best, request.starts, request.lengths, weights.local, self.runs, self.narrow,
            self.out.positions, self.out.there,
        )  # fmt: skip

    def numbers(self, request: Request, weights: Weights) -> tuple[int, ...]:
        """Those after the pointers."""
        runs, sk = weights.best.shape[1], weights.weight.shape[1]
        return request.k.shape[1], sk, runs, request.topk, request.local, request.grown


def new_empty_int(like: Tensor, *shape: int) -> Tensor:
    """An int32 tensor beside `like`."""
    return like.new_empty(*shape, dtype=torch.int32)


def is_selectable(request: Request, tiles: Tiles) -> bool:
    """Whether one program can hold what it chooses from."""
    return candidates(request.k.shape[2], request.topk, tiles.run) <= MOST_CANDIDATES


def sort_positions(request: Request, weights: Weights) -> Chosen:
    """What `choose_positions` gives, by torch.topk, for any size: every weight has to be written (a mask, no range)."""
    weight = weights.weight
    position = torch.arange(weight.shape[1], device=weight.device)
    rank = weight.where(weight == weight, torch.inf).view(torch.int32).to(torch.int64)
    rank = torch.where(rank < 0, rank ^ ALWAYS.value, rank)
    local = weight.shape[1] - request.local if weights.local is None else weights.local[:, None, None]
    is_local = position >= local
    heads = rank.view(request.k.shape[0], request.k.shape[1], -1)
    rank = torch.where(is_local, ALWAYS.value, heads).view_as(rank)
    rank = rank.masked_fill(weight == -torch.inf, NEVER.value)
    keys = (rank << 32) | (steps.LAST - position)
    chosen = keys.topk(request.topk, dim=-1, sorted=False).indices.sort(dim=-1).values
    absent = weight.gather(-1, chosen) == -torch.inf
    return Chosen(chosen.masked_fill(absent, -1), (weight != -torch.inf).sum(-1))


@triton.jit
def range_of(starts_ptr, lengths_ptr, b, sk, grown):
    """The first position that counts in batch row b, and the one after the last."""
    first, last = 0, sk
    if starts_ptr is not None:
        first = tl.load(starts_ptr + b).to(tl.int32)
    if lengths_ptr is not None:
        last = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32) + grown, sk)
    return first, last


@triton.jit
def first_local(local_ptr, b, last, local):
    """Where the positions begin that are always chosen."""
    begin = last - local
    if local_ptr is not None:
        begin = tl.load(local_ptr + b).to(tl.int32)
    return begin


@triton.jit
def rank_of(weight, is_local):
    """int32 that grow with fp32: below all of them where the weight is -inf, above them where the position is local."""
    bits = tl.where(weight == weight, weight, float("inf"))
    bits = tl.where(bits == 0.0, 0.0, bits).to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ ALWAYS, bits)
    return tl.where(weight == float("-inf"), NEVER, tl.where(is_local, ALWAYS, rank))


@triton.jit
def store_best(best_ptr, rank, pid, runs, start, BLOCK: tl.constexpr, RUN: tl.constexpr):
    """The largest rank of each run of a tile that begins at position `start`."""
    run = start // RUN + tl.arange(0, BLOCK // RUN)
    best = tl.max(tl.reshape(rank, (BLOCK // RUN, RUN)), axis=1)
    tl.store(best_ptr + offset(pid, runs) + run, best, mask=run < runs)


@triton.jit
def bar_of(rank, count, enough, base):
    """The highest bar from `base` that `count` uint32 reach, or a lower one that at most `enough` reach.

    `base` itself where fewer than `count` are above it. Two bits a step.
    """
    above = tl.where(rank > base, rank - base, 0)
    highest = tl.max(above, axis=0)
    shift = 30
    while (shift > 0) & ((highest >> shift) == 0):
        shift -= 2
    bar, reached = highest - highest, 2**31 - 1
    while (shift >= 0) & (reached > enough):
        one = (highest - highest + 1) << shift
        two = bar + one + one
        a, b, c = tl.reduce(
            (_reach(above, bar + one), _reach(above, two), _reach(above, two + one)),
            axis=0,
            combine_fn=_added3,
        )
        digit = (a >= count).to(tl.int32) + (b >= count).to(tl.int32) + (c >= count).to(tl.int32)
        reached = tl.where(digit == 3, c, tl.where(digit == 2, b, tl.where(digit == 1, a, reached)))
        bar += digit.to(tl.uint32) << shift
        shift -= 2
    return base + bar


@triton.jit
def _reach(rank, bar):
    return (rank >= bar).to(tl.int32)


@triton.jit
def _added3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _unsigned(rank):
    """The same order in uint32, with 0 for what is not there."""
    return rank.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def best_of(rank, least, count):
    """Whether each uint32 is one of the `count` best, of which `least` is the last; its place among them; how many."""
    above, equal = rank > least, (rank == least) & (rank > 0)
    # How many above in the low half, how many equal in the high half, up to and with each.
    before = tl.cumsum(above.to(tl.uint32) + (equal.to(tl.uint32) << 16), axis=0)
    above_before, equal_before = (before & 0xFFFF).to(tl.int32), (before >> 16).to(tl.int32)
    room = count - tl.sum(above.to(tl.int32), axis=0)
    is_best = above | (equal & (equal_before <= room))
    place = above_before + tl.minimum(equal_before, room) - 1
    return is_best, place, tl.sum(is_best.to(tl.int32), axis=0)


@triton.jit
def _select(
    weight_ptr, best_ptr, starts_ptr, lengths_ptr, local_ptr, runs_ptr, narrow_ptr, positions_ptr, there_ptr,
    kv_heads, sk, runs, topk, local, grown,
    RUNS_PAD: tl.constexpr, K_PAD: tl.constexpr, RUN: tl.constexpr, NARROW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program p: the topk best positions of group p."""
    await_launch(EARLY)
    select_positions(
        weight_ptr, best_ptr, starts_ptr, lengths_ptr, local_ptr, runs_ptr, narrow_ptr, positions_ptr, there_ptr,
        tl.program_id(0), kv_heads, sk, runs, topk, local, grown, RUNS_PAD, K_PAD, RUN, NARROW,
    )  # fmt: skip


@triton.jit
def select_positions(
    weight_ptr, best_ptr, starts_ptr, lengths_ptr, local_ptr, runs_ptr, narrow_ptr, positions_ptr, there_ptr,
    pid, kv_heads, sk, runs, topk, local, grown,
    RUNS_PAD: tl.constexpr, K_PAD: tl.constexpr, RUN: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """The topk best positions of group `pid`, by one program."""
    b = pid // kv_heads
    first, last = range_of(starts_ptr, lengths_ptr, b, sk, grown)
    slot = tl.arange(0, K_PAD)
    out = offset(pid, topk)

    run = tl.arange(0, RUNS_PAD)
    counts = (run < runs) & (run * RUN < last) & ((run + 1) * RUN > first)
    rank = _unsigned(tl.load(best_ptr + offset(pid, runs) + run, mask=counts, other=NEVER))
    least = bar_of(rank, topk, topk, 0)
    is_best, place, found = best_of(rank, least, topk)
    tl.store(runs_ptr + out + place, run, mask=is_best)
    tl.store(runs_ptr + out + slot, -1, mask=(slot >= found) & (slot < topk))
    more = tl.sum((rank > 0).to(tl.int32), axis=0)
    tl.debug_barrier()  # what other threads of this program stored is read next

    nth = tl.arange(0, K_PAD * RUN)
    mine = tl.load(runs_ptr + out + nth // RUN, mask=nth // RUN < topk, other=-1)
    pos = mine * RUN + nth % RUN
    weight = tl.load(weight_ptr + offset(pid, sk) + pos, mask=(mine >= 0) & (pos < sk), other=float("-inf"))
    rank = _unsigned(rank_of(weight, pos >= first_local(local_ptr, b, last, local)))
    # More runs than topk hold more positions than topk; else every position that is there is in these runs.
    tl.store(there_ptr + pid, tl.maximum(more, tl.sum((rank > 0).to(tl.int32), axis=0)))
    # So many runs have a position at the bar of the runs that no other position can be chosen; few have two.
    is_likely = rank >= tl.maximum(least, 1)
    likely = tl.sum(is_likely.to(tl.int32), axis=0)
    if likely <= NARROW:
        few, few_ptr = tl.arange(0, NARROW), narrow_ptr + offset(pid, 2 * NARROW)
        into = few_ptr + tl.cumsum(is_likely.to(tl.int32), axis=0) - 1
        tl.store(into, rank.to(tl.int32, bitcast=True), mask=is_likely)
        tl.store(into + NARROW, pos, mask=is_likely)
        tl.debug_barrier()
        few_ranks = tl.load(few_ptr + few, mask=few < likely, other=0).to(tl.uint32, bitcast=True)
        few_pos = tl.load(few_ptr + NARROW + few, mask=few < likely, other=-1)
        bar = bar_of(few_ranks, topk, topk, least)
        _store_best(positions_ptr + out, few_ranks, few_pos, bar, topk, K_PAD)
    else:
        _store_best(positions_ptr + out, rank, pos, bar_of(rank, topk, topk, least), topk, K_PAD)


@triton.jit
def _store_best(positions, rank, pos, least, topk, K_PAD: tl.constexpr):
    """Stores the positions of the topk best, in their order, then -1."""
    slot = tl.arange(0, K_PAD)
    is_best, place, found = best_of(rank, least, topk)
    tl.store(positions + place, pos, mask=is_best)
    tl.store(positions + slot, -1, mask=(slot >= found) & (slot < topk))
