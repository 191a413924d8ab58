"""One decoding step over a ring of keys in Triton: parts of the ring side by side, joined by the last to end.

The G query heads of a key/value head are the rows of one product, so keys and values are read once. Sinks are scored
with the second query, whose heads are rows of the same product. Lengths are read on the device: a captured graph
follows them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from attnopt.kernels._triton import (
    await_launch,
    can_overlap,
    dot,
    dot_precision,
    fetch_ahead,
    next_power_of_two,
    offset,
    on_device_of,
)
from attnopt.kernels.streaming.ring import Step

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

#: Multiprocessors of an H100 or H200.
PROCESSORS = 132

#: Channels or keys that are summed one after the other in fp32, by multiply-adds; above it rounding errors add up.
EXACT_CHUNK = 32

#: Slots of each part that are asked for while the launch before ends: from 69 to 73 % of the copy rate in 64 rings of
#: 1,024, from 80 to 84 % of 2,048. It gains nothing where a third program finds room on a multiprocessor.
EARLY = 128

#: Numbers of unfinished sums that are joined at once.
JOINED = 8192


@dataclass(frozen=True, slots=True)
class Tiles:
    """Slots in a tile, slots in one part, warps, and tiles in flight.

    overlap: whether a launch is set up while the one before it ends, where the GPU can; ahead: slots of each part,
    a power of two or 0, that are asked for even then.
    """

    block: int
    part: int
    warps: int = 4
    stages: int = 3
    overlap: bool = True
    ahead: int = 0


def choose_tiles(step: Step) -> Tiles:
    """Few rings: one wide program on each multiprocessor. Many: two narrow ones. Rounds of them few and full.

    A third would let those of the next launch settle where they find room, unevenly.
    """
    batch, kv_heads, slots, d = step.keys.shape
    row = next_power_of_two(max(d, step.values.shape[3])) * step.keys.element_size()
    pairs, few = batch * kv_heads, batch * kv_heads < PROCESSORS
    block = max(16, min(128 if few else 64, (32768 if few else 16384) // row))
    if step.keys.dtype == torch.float32:
        block = max(16, min(EXACT_CHUNK, 16384 // row))
    resident = PROCESSORS if few else 2 * PROCESSORS
    part = block * _tiles_each(pairs, triton.cdiv(slots, block), resident)
    wide = few or row > 256
    return Tiles(block, part, 8 if wide else 4, 3 if wide else 4, ahead=EARLY)


def _tiles_each(pairs: int, tiles: int, resident: int) -> int:
    """Of all ways to share out `tiles` evenly, the quickest: rounds, times a program's tiles and one for its start."""
    shares = {triton.cdiv(tiles, parts) for parts in range(1, min(tiles, 2 * resident) + 1)}
    return min(
        shares, key=lambda each: (triton.cdiv(pairs * triton.cdiv(tiles, each), resident) * (each + 1), -each)
    )


def launch(step: Step, tiles: Tiles | None = None) -> torch.Tensor:
    """(B, H, Dv) in q's dtype, on the current stream: what `ring.decode_in_torch` computes; `step.seen` is filled.

    fp32, bf16 or fp16; D and Dv at most 256; no dimension may be empty. `tiles` overrides `choose_tiles`.
    """
    tiles = tiles or choose_tiles(step)
    near, far, keys, values, span, slopes = (
        step.near,
        step.far,
        step.keys,
        step.values,
        step.span,
        step.slopes,
    )
    batch, heads, d = near.shape
    kv_heads, dv, group = keys.shape[1], values.shape[3], heads // keys.shape[1]
    parts, two = triton.cdiv(span.slots, tiles.part), span.sinks > 0 and far is not near
    out = near.new_empty(batch, heads, dv)
    sums = near.new_empty(batch * kv_heads, parts, group, dv, dtype=torch.float32) if parts > 1 else out
    tops = near.new_empty(2, batch * kv_heads, parts, group, dtype=torch.float32) if parts > 1 else out
    rows = next_power_of_two(group, least=8 if two else 16)
    d_pad, joined = next_power_of_two(d), _sizes_of_join(group, dv, parts)
    overlap = tiles.overlap and can_overlap(near)
    ahead = tiles.ahead if keys.stride(3) == values.stride(3) == 1 else 0
    flags = {"OVERLAP": overlap, "launch_pdl": overlap, "num_warps": tiles.warps}
    with on_device_of(near):
        decode_kernel[(batch * kv_heads, parts)](
            near, far, keys, values, step.newest, None if slopes is None else slopes.float(),
            out, sums, tops, step.tickets, step.seen,
            *near.stride(), *far.stride(), *keys.stride(), *values.stride(),
            kv_heads, group, d, dv, parts, tiles.part, span.sinks, span.window, span.ring, step.scale,
            BLOCK=tiles.block, WHOLE=parts == 1, TWO=two, ROWS=rows, AHEAD=ahead,
            D_PAD=d_pad, CHUNK=min(d_pad, EXACT_CHUNK) if near.dtype == torch.float32 else d_pad,
            PRECISION=dot_precision(near.dtype), num_stages=tiles.stages, **joined, **flags,
        )  # fmt: skip
        if parts > 1 and step.tickets is None:
            join_kernel[(batch * kv_heads,)](sums, tops, out, group, dv, parts, **joined, **flags)
    return out


def _sizes_of_join(group: int, dv: int, parts: int) -> dict[str, int]:
    """Powers of two: columns, heads and parts of what is joined at once."""
    columns, heads = next_power_of_two(dv), triton.next_power_of_2(group)
    return {
        "DV_PAD": columns, "HEADS_PAD": heads,
        "PARTS_PAD": min(triton.next_power_of_2(parts), max(1, JOINED // (heads * columns))),
    }  # fmt: skip


@triton.jit
def fetch_rows(row, d, D_PAD: tl.constexpr):
    """Brings d neighbouring channels of rows that begin at `row` into L2, lines of 128 bytes."""
    EACH: tl.constexpr = 1024 // row.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (D_PAD + EACH - 1) // EACH
    c = tl.minimum(tl.arange(0, LINES) * EACH, d - 1)
    fetch_ahead(row[:, None] + c[None, :])


@triton.jit
def load_queries(
    near_row, far_row, near_sd, far_sd, c, d, group, TWO: tl.constexpr, ROWS: tl.constexpr, G_PAD: tl.constexpr
):  # fmt: skip
    """(G_PAD, channels c): the queries for the window in the first ROWS rows, those for the sinks in the others."""
    g = tl.arange(0, G_PAD)
    is_near = (g < group)[:, None] & (c < d)[None, :]
    q = tl.load(near_row[:, None] + offset(c, near_sd)[None, :], mask=is_near, other=0.0)
    if TWO:
        is_far = ((g >= ROWS) & (g < ROWS + group))[:, None] & (c < d)[None, :]
        q = tl.where(
            is_near, q, tl.load(far_row[:, None] + offset(c, far_sd)[None, :], mask=is_far, other=0.0)
        )
    return q


@triton.jit
def folded(acc, top, total, ROWS: tl.constexpr, DV_PAD: tl.constexpr):
    """The running softmax over the window and that over the sinks, 2 * ROWS rows, as one of ROWS rows."""
    tops = tl.reshape(top, (2, ROWS))
    higher = tl.max(tops, axis=0)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    shrink = tl.exp2(tops - base[None, :])
    acc = tl.sum(tl.reshape(acc, (2, ROWS, DV_PAD)) * shrink[:, :, None], axis=0)
    return acc, higher, tl.sum(tl.reshape(total, (2, ROWS)) * shrink, axis=0)


@triton.jit
def join(
    sum_ptr, top_ptr, out_ptr, pid, pairs, group, dv, parts,
    HEADS_PAD: tl.constexpr, PARTS_PAD: tl.constexpr, DV_PAD: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of group `pid`, always in the same order, and writes its rows of the output."""
    p, g, e = tl.arange(0, PARTS_PAD), tl.arange(0, HEADS_PAD), tl.arange(0, DV_PAD)
    rows = offset(pairs * parts, group)
    top = tl.full((HEADS_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS_PAD,), tl.float32)
    acc = tl.zeros((HEADS_PAD, DV_PAD), tl.float32)
    for start in range(0, parts, PARTS_PAD):
        part = start + p
        row = offset(pid * parts + part, group)[:, None] + g[None, :]
        there = (part < parts)[:, None] & (g < group)[None, :]
        # Other programs wrote these just now: they are read from L2, which all share.
        tops = tl.load(top_ptr + row, mask=there, other=float("-inf"), cache_modifier=".cg")
        totals = tl.load(top_ptr + rows + row, mask=there, other=0.0, cache_modifier=".cg")
        at = sum_ptr + offset(row, dv)[:, :, None] + e[None, None, :]
        sums = tl.load(at, mask=there[:, :, None] & (e < dv)[None, None, :], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(tops, axis=0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, grow = tl.exp2(top - base), tl.exp2(tops - base[None, :])
        total = total * shrink + tl.sum(totals * grow, axis=0)
        acc = acc * shrink[:, None] + tl.sum(sums * grow[:, :, None], axis=0)
        top = higher
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = offset(offset(pid, group) + g, dv)[:, None] + e[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=(g < group)[:, None] & (e < dv)[None, :])


@triton.jit
def leave(
    acc, top, total, out_ptr, sum_ptr, top_ptr, ticket_ptr, pid, part, group, dv, parts,
    WHOLE: tl.constexpr, ROWS: tl.constexpr, DV_PAD: tl.constexpr, HEADS_PAD: tl.constexpr, PARTS_PAD: tl.constexpr,
):  # fmt: skip
    """Writes the output, or leaves a part's sums; whoever finds by the tickets that it is the last, joins them."""
    r, e = tl.arange(0, ROWS), tl.arange(0, DV_PAD)
    row = offset(pid * parts + part, group) + r
    there = (r < group)[:, None] & (e < dv)[None, :]
    at = offset(row, dv)[:, None] + e[None, :]
    if WHOLE:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=there)
    else:
        pairs = tl.num_programs(0)
        tl.store(sum_ptr + at, acc, mask=there)
        tl.store(top_ptr + row, top, mask=r < group)
        tl.store(top_ptr + offset(pairs * parts, group) + row, total, mask=r < group)
        if ticket_ptr is not None:
            # All threads have stored before the ticket is drawn; who draws the last one sees what all have stored.
            tl.debug_barrier()
            if tl.atomic_add(ticket_ptr + pid, 1, sem="acq_rel") == parts - 1:
                tl.store(ticket_ptr + pid, 0)
                join(sum_ptr, top_ptr, out_ptr, pid, pairs, group, dv, parts, HEADS_PAD, PARTS_PAD, DV_PAD)


@triton.jit
def decode_kernel(
    near_ptr, far_ptr, k_ptr, v_ptr, newest_ptr, slope_ptr, out_ptr, sum_ptr, top_ptr, ticket_ptr, count_ptr,
    near_sb, near_sh, near_sd, far_sb, far_sh, far_sd,
    k_sb, k_sh, k_ss, k_sd, v_sb, v_sh, v_ss, v_sd,
    kv_heads, group, d, dv, parts, share, sinks, window, ring, scale,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, TWO: tl.constexpr, ROWS: tl.constexpr,
    AHEAD: tl.constexpr, D_PAD: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
    DV_PAD: tl.constexpr, HEADS_PAD: tl.constexpr, PARTS_PAD: tl.constexpr,
):  # fmt: skip
    """Program (p, j): the heads of group p over part j, of `share` slots; the last one of a group joins its parts."""
    pid, part = tl.program_id(0), tl.program_id(1)
    b, h = pid // kv_heads, pid % kv_heads
    k_ptr += offset(b, k_sb) + offset(h, k_sh)
    v_ptr += offset(b, v_sb) + offset(h, v_sh)
    if OVERLAP and AHEAD > 0:
        ahead = tl.minimum(part * share + tl.arange(0, AHEAD), sinks + ring - 1)
        fetch_rows(k_ptr + offset(ahead, k_ss), d, D_PAD)
        fetch_rows(v_ptr + offset(ahead, v_ss), dv, DV_PAD)
    await_launch(OVERLAP)
    newest = tl.load(newest_ptr + b)
    G_PAD: tl.constexpr = 2 * ROWS if TWO else ROWS
    g, c, e = tl.arange(0, G_PAD), tl.arange(0, CHUNK), tl.arange(0, DV_PAD)
    unit = scale * LOG2E
    near_row = near_ptr + offset(b, near_sb) + offset(h * group + g, near_sh)
    far_row = far_ptr + offset(b, far_sb) + offset(h * group + g - ROWS, far_sh)
    q = load_queries(near_row, far_row, near_sd, far_sd, c, d, group, TWO, ROWS, G_PAD)
    if slope_ptr is not None:
        tilt = tl.load(slope_ptr + h * group + g % ROWS, mask=g % ROWS < group, other=0.0) * LOG2E
    top = tl.full((G_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    acc = tl.zeros((G_PAD, DV_PAD), tl.float32)

    # 64 bits end here. The newest key lies `turn` slots after the first of the ring; slots are filled in order.
    turn = ((newest - sinks) % ring).to(tl.int32)
    oldest = tl.minimum(newest - sinks, window - 1).to(tl.int32)
    last = tl.minimum(newest, sinks + ring - 1).to(tl.int32)
    place = tl.minimum(newest, sinks + window - 1).to(tl.int32)
    first = part * share
    for start in range(first, tl.minimum(first + share, last + 1), BLOCK):
        slot = start + tl.arange(0, BLOCK)
        is_sink = slot < sinks
        behind = turn - (slot - sinks)
        behind = tl.where(behind < 0, behind + ring, behind)
        seen = (slot <= last) & (is_sink | (behind <= oldest))
        k_row = k_ptr + offset(slot, k_ss)[None, :]
        k = tl.load(k_row + offset(c, k_sd)[:, None], mask=(c < d)[:, None] & seen[None, :], other=0.0)
        v = tl.load(
            v_ptr + offset(slot, v_ss)[:, None] + offset(e, v_sd)[None, :],
            mask=seen[:, None] & (e < dv)[None, :], other=0.0,
        )  # fmt: skip
        # A factor on each part: without one the parts would become one chain of multiply-adds.
        s = dot(q, k, PRECISION) * unit
        for at in tl.static_range(CHUNK, D_PAD, CHUNK):
            more = load_queries(near_row, far_row, near_sd, far_sd, at + c, d, group, TWO, ROWS, G_PAD)
            k = tl.load(
                k_row + offset(at + c, k_sd)[:, None], mask=(at + c < d)[:, None] & seen[None, :], other=0.0
            )
            s += dot(more, k, PRECISION) * unit
        if slope_ptr is not None:
            s -= tilt[:, None] * tl.where(is_sink, place - slot, behind).to(tl.float32)[None, :]
        meets = seen[None, :]
        if TWO:
            meets = meets & (is_sink[None, :] == (g >= ROWS)[:, None])
        s = tl.where(meets, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, PRECISION)
        total = total * shrink + tl.sum(p, axis=1)
        top = higher

    if TWO:
        acc, top, total = folded(acc, top, total, ROWS, DV_PAD)
    if count_ptr is not None:
        tl.store(count_ptr + b, newest + 1, mask=(h == 0) & (part == 0) & (newest >= 0))
    leave(
        acc, top, total, out_ptr, sum_ptr, top_ptr, ticket_ptr, pid, part, group, dv, parts,
        WHOLE, ROWS, DV_PAD, HEADS_PAD, PARTS_PAD,
    )  # fmt: skip


@triton.jit
def join_kernel(
    sum_ptr, top_ptr, out_ptr, group, dv, parts,
    DV_PAD: tl.constexpr, HEADS_PAD: tl.constexpr, PARTS_PAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program p: joins the parts of group p, where no ticket is drawn."""
    await_launch(OVERLAP)
    pid = tl.program_id(0)
    join(sum_ptr, top_ptr, out_ptr, pid, tl.num_programs(0), group, dv, parts, HEADS_PAD, PARTS_PAD, DV_PAD)
