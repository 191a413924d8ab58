"""Device code of SparQ's start: the new token into the cache, and the channels of the query.

It is a launch of its own where there are many groups. With few of them each program that reads keys by channel does it
for itself: what it chooses it leaves in memory, in a place of its own, and reads there like what another launch left.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels._triton import await_launch, next_power_of_two, offset
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import ordered
from attnopt.kernels.sparq.triton_select import bar_of, best_of

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """index (P, r) int32, ascending; queries (P, G, r) in q's dtype; heat (P, G) fp32, log2(e) included.

    Where each of n programs to a group chooses for itself, n * P stands for P.
    """

    index: Tensor
    queries: Tensor
    heat: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Token:
    """The key (B, Hkv, 1, D) and value (B, Hkv, 1, Dv) of one position, for the end of the request's buffers."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Unchosen:
    """In the place of channels: whoever needs them chooses them, and one program of each group appends the token."""

    token: Token | None


#: Channels, or that they are still to be chosen.
Start = Channels | Unchosen


def choose_channels(request: Request, token: Token | None = None, *, early: bool = False) -> Channels:
    """Launches one program per group: the channels with the largest |q| summed over the group.

    The same program appends a token at `lengths`, to both key layouts, the values and their running mean.
    """
    groups, out = request.k.shape[0] * request.k.shape[1], room_for_channels(request, 1)
    sizes = start_sizes(request)
    _channels[(groups,)](
        out.index, out.queries, out.heat, *start_arguments(request, token), request.starts, request.lengths,
        request.k.shape[1], request.group, request.k.shape[2], request.channels,
        **sizes, **ordered(early=early), num_warps=min(8, max(1, sizes["HEADS"] * sizes["D_PAD"] // 512)),
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Own:
    """What a kernel takes that reads channels, or chooses them first: pointers to index, queries and
    heat, and what choosing takes.
    """

    pointers: tuple[Tensor, Tensor, Tensor]
    arguments: tuple[Tensor | float | None, ...]
    sizes: dict[str, int | bool]


def channels_for(request: Request, chosen: Start, programs: int) -> Own:
    """For a launch of so many programs to a group."""
    is_chosen, token = isinstance(chosen, Channels), None if isinstance(chosen, Channels) else chosen.token
    found = chosen if isinstance(chosen, Channels) else room_for_channels(request, programs)
    sizes = {**start_sizes(request), "OWN": not is_chosen}
    return Own((found.index, found.queries, found.heat), start_arguments(request, token), sizes)


def room_for_channels(request: Request, programs: int) -> Channels:
    """Unwritten, for so many programs to a group."""
    q, rank, group = request.q, request.channels, request.group
    rows = request.k.shape[0] * request.k.shape[1] * programs
    return Channels(
        q.new_empty(rows, rank, dtype=torch.int32),
        q.new_empty(rows, group, rank),
        q.new_empty(rows, group, dtype=torch.float32),
    )


def start_arguments(request: Request, token: Token | None) -> tuple[Tensor | float | None, ...]:
    """Of `start_group`: pointers, strides and widths."""
    q, k, v, k_t, mean = request.q, request.k, request.v, request.k_t, request.v_mean
    scales = (q.stride(0), q.stride(1), q.stride(3), request.scale)
    if token is None:
        return (q, *(None,) * 6, *scales, *(0,) * 21, q.shape[3], v.shape[3])
    return (
        q, token.k, token.v, k, v, k_t, mean, *scales,
        *(x.stride(i) for x in (token.k, token.v) for i in (0, 1, 3)),
        *k.stride(), *v.stride(), *strides_of(k_t, 4), *strides_of(mean, 3), q.shape[3], v.shape[3],
    )  # fmt: skip


def start_sizes(request: Request) -> dict[str, int]:
    """Of `start_group`, known when compiled."""
    return {
        "HEADS": triton.next_power_of_2(request.group),
        "D_PAD": next_power_of_two(request.q.shape[3]),
        "DV_PAD": next_power_of_two(request.v.shape[3]),
    }


def strides_of(x: Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides of x, or zeros for an absent tensor of this rank."""
    return (0,) * rank if x is None else x.stride()


@triton.jit
def _channels(
    index_ptr, queries_ptr, heat_ptr,
    q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, kt_ptr, mean_ptr,
    q_sb, q_sh, q_sd, scale, nk_sb, nk_sh, nk_sd, nv_sb, nv_sh, nv_sd,
    k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, kt_sb, kt_sh, kt_sd, kt_sn, mean_sb, mean_sh, mean_sd, d, dv,
    starts_ptr, lengths_ptr, kv_heads, group, sk, rank,
    HEADS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program p: appends to group p; packs its r best channels, ascending, and what they are multiplied by."""
    await_launch(EARLY)
    start_group(
        index_ptr, queries_ptr, heat_ptr,
        q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, kt_ptr, mean_ptr,
        q_sb, q_sh, q_sd, scale, nk_sb, nk_sh, nk_sd, nv_sb, nv_sh, nv_sd,
        k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, kt_sb, kt_sh, kt_sd, kt_sn, mean_sb, mean_sh, mean_sd, d, dv,
        starts_ptr, lengths_ptr, kv_heads, group, sk, rank, tl.program_id(0), 0, 1, sk,
        HEADS, D_PAD, DV_PAD,
    )  # fmt: skip


@triton.jit
def start_group(
    index_ptr, queries_ptr, heat_ptr,
    q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, kt_ptr, mean_ptr,
    q_sb, q_sh, q_sd, scale, nk_sb, nk_sh, nk_sd, nv_sb, nv_sh, nv_sd,
    k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, kt_sb, kt_sh, kt_sd, kt_sn, mean_sb, mean_sh, mean_sd, d, dv,
    starts_ptr, lengths_ptr, kv_heads, group, sk, rank, pid, part, parts, split,
    HEADS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Packs the channels of group `pid` at its part's place; appends if the token's position is in that part.

    No other part reads that position, so none can read it half written.
    """
    b, h = pid // kv_heads, pid % kv_heads
    if new_k_ptr is not None:
        pos = tl.load(lengths_ptr + b).to(tl.int64)
        if tl.minimum(pos // split, parts - 1) == part:
            append(
                new_k_ptr, new_v_ptr, k_ptr, v_ptr, kt_ptr, mean_ptr, starts_ptr, lengths_ptr,
                nk_sb, nk_sh, nk_sd, nv_sb, nv_sh, nv_sd,
                k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, kt_sb, kt_sh, kt_sd, kt_sn, mean_sb, mean_sh, mean_sd,
                b, h, d, dv, sk, D_PAD, DV_PAD,
            )  # fmt: skip
    place = offset(pid, parts) + part
    g, c = tl.arange(0, HEADS), tl.arange(0, D_PAD)
    there = (g < group)[:, None] & (c < d)[None, :]
    at = offset(b, q_sb) + offset(h * group + g, q_sh)[:, None] + offset(c, q_sd)[None, :]
    q = tl.load(q_ptr + at, mask=there, other=0.0)
    size = tl.abs(q.to(tl.float32))

    # A NaN would have no place in the order: it counts as infinite. What is not there comes after zero.
    weight = tl.sum(size, axis=0)
    weight = tl.where(weight == weight, weight, float("inf"))
    order = tl.where(c < d, weight.to(tl.uint32, bitcast=True) + 1, 0)
    chosen, slot, _ = best_of(order, bar_of(order, rank, rank, 0), rank)

    tl.store(index_ptr + place * rank + slot, c, mask=chosen)
    row = place * group + g
    tl.store(queries_ptr + offset(row, rank)[:, None] + slot[None, :], q, mask=there & chosen[None, :])
    whole = tl.sum(size, axis=1)
    taken = tl.sum(tl.where(chosen[None, :], size, 0.0), axis=1)
    heat = scale * LOG2E * tl.sqrt_rn(tl.div_rn(whole, tl.where(taken > 0, taken, 1.0)))
    tl.store(heat_ptr + row, tl.where(taken > 0, heat, 0.0), mask=g < group)


@triton.jit
def append(
    new_k_ptr, new_v_ptr, k_ptr, v_ptr, kt_ptr, mean_ptr, starts_ptr, lengths_ptr,
    nk_sb, nk_sh, nk_sd, nv_sb, nv_sh, nv_sd,
    k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, kt_sb, kt_sh, kt_sd, kt_sn, mean_sb, mean_sh, mean_sd,
    b, h, d, dv, sk,
    D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Writes one token at the length of batch row b, and takes its value into the running mean; nowhere beyond Sk."""
    c, e = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    pos = tl.load(lengths_ptr + b).to(tl.int64)
    fits = pos < sk
    k = tl.load(new_k_ptr + offset(b, nk_sb) + offset(h, nk_sh) + offset(c, nk_sd), mask=c < d, other=0.0)
    v = tl.load(new_v_ptr + offset(b, nv_sb) + offset(h, nv_sh) + offset(e, nv_sd), mask=e < dv, other=0.0)
    k_at = k_ptr + offset(b, k_sb) + offset(h, k_sh) + pos * k_sn + offset(c, k_sd)
    v_at = v_ptr + offset(b, v_sb) + offset(h, v_sh) + pos * v_sn + offset(e, v_sd)
    tl.store(k_at, k, mask=(c < d) & fits)
    tl.store(v_at, v, mask=(e < dv) & fits)
    if kt_ptr is not None:
        kt_at = kt_ptr + offset(b, kt_sb) + offset(h, kt_sh) + offset(c, kt_sd) + pos * kt_sn
        tl.store(kt_at, k, mask=(c < d) & fits)
    if mean_ptr is not None:
        first = 0
        if starts_ptr is not None:
            first = tl.load(starts_ptr + b).to(tl.int64)
        mean_at = mean_ptr + offset(b, mean_sb) + offset(h, mean_sh) + offset(e, mean_sd)
        mean = tl.load(mean_at, mask=e < dv, other=0.0)
        count = tl.maximum(pos - first + 1, 1).to(tl.float32)
        mean += (v.to(tl.float32) - mean) / count
        tl.store(mean_at, mean, mask=(e < dv) & fits & (pos >= first))
