"""One decoding step over a ring of keys in Triton: parts of the ring side by side, then one small launch joins them.

The G query heads of a key/value head are the rows of one product, so keys and values are read once. Sinks are scored
with the second query, by the first part alone. Lengths are read on the device: a captured graph follows them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from attnopt.kernels._triton import dot, dot_precision, next_power_of_two, offset, on_device_of
from attnopt.kernels.streaming.ring import Step

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)

#: Programs that keep an H100 or H200 busy: two for each of 132 multiprocessors.
PROGRAMS = 264


@dataclass(frozen=True, slots=True)
class Tiles:
    """Slots in a tile, slots of the ring in one part, warps, and tiles in flight."""

    block: int
    part: int
    warps: int = 4
    stages: int = 3


def choose_tiles(step: Step) -> Tiles:
    """Parts so many that the GPU is full, of at least two tiles each; tiles of 16 KiB of keys or less."""
    batch, kv_heads, _, d = step.keys.shape
    width = next_power_of_two(max(d, step.values.shape[3]))
    block = max(16, min(64, 16384 // (width * step.keys.element_size())))
    parts = max(1, triton.cdiv(PROGRAMS, batch * kv_heads))
    part = triton.cdiv(triton.cdiv(step.span.ring, parts), block) * block
    return Tiles(block, max(part, 2 * block), 4 if width * step.keys.element_size() <= 256 else 8)


def launch(step: Step, tiles: Tiles | None = None) -> torch.Tensor:
    """(B, H, Dv) in q's dtype, on the current stream: what `ring.decode_in_torch` computes.

    fp32, bf16 or fp16; D and Dv at most 256; no dimension may be empty. `tiles` overrides `choose_tiles`.
    """
    tiles = tiles or choose_tiles(step)
    near, far, keys, values, span = step.near, step.far, step.keys, step.values, step.span
    batch, heads, d = near.shape
    kv_heads, dv = keys.shape[1], values.shape[3]
    group, parts = heads // kv_heads, triton.cdiv(span.ring, tiles.part)
    out = near.new_empty(batch, heads, dv)
    sums = near.new_empty(batch * kv_heads, parts, group, dv, dtype=torch.float32) if parts > 1 else out
    tops = near.new_empty(2, batch * kv_heads, parts, group, dtype=torch.float32) if parts > 1 else out
    sizes = {"G_PAD": next_power_of_two(group), "DV_PAD": next_power_of_two(dv)}
    with on_device_of(near):
        decode_kernel[(batch * kv_heads, parts)](
            near, far, keys, values, step.newest, near if step.slopes is None else step.slopes.float(),
            out, sums, tops,
            *near.stride(), *far.stride(), *keys.stride(), *values.stride(),
            kv_heads, group, d, dv, span.sinks, span.window, span.ring, step.scale,
            PART=tiles.part, BLOCK=tiles.block, BLOCK_HEAD=next_power_of_two(span.sinks), WHOLE=parts == 1,
            SINKS=span.sinks > 0, ALIBI=step.slopes is not None, D_PAD=next_power_of_two(d), **sizes,
            PRECISION=dot_precision(near.dtype), num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        if parts > 1:
            join_kernel[(batch * kv_heads,)](sums, tops, out, group, dv, parts, **sizes)
    return out


@triton.jit
def load_query(q_ptr, b, h, q_sb, q_sh, q_sd, group, d, G_PAD: tl.constexpr, D_PAD: tl.constexpr):
    """(G_PAD, D_PAD): the queries of kv head h, zero outside."""
    g, c = tl.arange(0, G_PAD), tl.arange(0, D_PAD)
    at = q_ptr + offset(b, q_sb) + offset(h * group + g, q_sh)[:, None] + offset(c, q_sd)[None, :]
    return tl.load(at, mask=(g < group)[:, None] & (c < d)[None, :], other=0.0)


@triton.jit
def visit(
    acc, top, total, q, k_ptr, v_ptr, slot, seen, away, tilt, unit, k_ss, k_sd, v_ss, v_sd, d, dv,
    D_PAD: tl.constexpr, DV_PAD: tl.constexpr, ALIBI: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The running softmax after the keys in the slots `slot` (N,), of which `seen` are there, `away` behind."""
    c, e = tl.arange(0, D_PAD), tl.arange(0, DV_PAD)
    k = tl.load(
        k_ptr + offset(slot, k_ss)[None, :] + offset(c, k_sd)[:, None],
        mask=(c < d)[:, None] & seen[None, :], other=0.0,
    )  # fmt: skip
    v = tl.load(
        v_ptr + offset(slot, v_ss)[:, None] + offset(e, v_sd)[None, :],
        mask=seen[:, None] & (e < dv)[None, :], other=0.0,
    )  # fmt: skip
    s = dot(q, k, PRECISION) * unit
    if ALIBI:
        s -= tilt[:, None] * away.to(tl.float32)[None, :]
    s = tl.where(seen[None, :], s, float("-inf"))
    higher = tl.maximum(top, tl.max(s, axis=1))
    base = tl.where(higher == float("-inf"), 0.0, higher)
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(top - base)
    acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, PRECISION)
    return acc, higher, total * shrink + tl.sum(p, axis=1)


@triton.jit
def decode_kernel(
    near_ptr, far_ptr, k_ptr, v_ptr, newest_ptr, slope_ptr, out_ptr, sum_ptr, top_ptr,
    near_sb, near_sh, near_sd, far_sb, far_sh, far_sd,
    k_sb, k_sh, k_ss, k_sd, v_sb, v_sh, v_ss, v_sd,
    kv_heads, group, d, dv, sinks, window, ring, scale,
    PART: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HEAD: tl.constexpr, WHOLE: tl.constexpr,
    SINKS: tl.constexpr, ALIBI: tl.constexpr, D_PAD: tl.constexpr, G_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Program (p, j): the heads of group p over part j of the ring, and part 0 over the sinks."""
    pid, part = tl.program_id(0), tl.program_id(1)
    b, h = pid // kv_heads, pid % kv_heads
    g, e = tl.arange(0, G_PAD), tl.arange(0, DV_PAD)
    unit = scale * LOG2E
    newest = tl.load(newest_ptr + b)
    k_ptr += offset(b, k_sb) + offset(h, k_sh)
    v_ptr += offset(b, v_sb) + offset(h, v_sh)
    tilt = tl.zeros((G_PAD,), tl.float32)
    if ALIBI:
        tilt = tl.load(slope_ptr + h * group + g, mask=g < group, other=0.0) * LOG2E
    top = tl.full((G_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    acc = tl.zeros((G_PAD, DV_PAD), tl.float32)

    if SINKS:  # noqa: SIM102 - this is known at compile time, the next on the device only
        if part == 0:
            far = load_query(far_ptr, b, h, far_sb, far_sh, far_sd, group, d, G_PAD, D_PAD)
            place = tl.minimum(newest, sinks + window - 1).to(tl.int32)
            for start in range(0, sinks, BLOCK_HEAD):
                slot = start + tl.arange(0, BLOCK_HEAD)
                seen = (slot < sinks) & (slot <= newest)
                acc, top, total = visit(
                    acc, top, total, far, k_ptr, v_ptr, slot, seen, place - slot, tilt, unit,
                    k_ss, k_sd, v_ss, v_sd, d, dv, D_PAD, DV_PAD, ALIBI, PRECISION,
                )  # fmt: skip

    near = load_query(near_ptr, b, h, near_sb, near_sh, near_sd, group, d, G_PAD, D_PAD)
    # The newest key lies `turn` slots after the first of the ring; 64 bits end here.
    turn = ((newest - sinks) % ring).to(tl.int32)
    oldest = tl.minimum(newest - sinks, window - 1).to(tl.int32)
    first = part * PART
    for start in range(first, tl.minimum(first + PART, ring), BLOCK):
        at = start + tl.arange(0, BLOCK)
        behind = turn - at
        behind = tl.where(behind < 0, behind + ring, behind)
        seen = (at < ring) & (behind <= oldest)
        acc, top, total = visit(
            acc, top, total, near, k_ptr, v_ptr, sinks + at, seen, behind, tilt, unit,
            k_ss, k_sd, v_ss, v_sd, d, dv, D_PAD, DV_PAD, ALIBI, PRECISION,
        )  # fmt: skip

    row = offset(pid * tl.num_programs(1) + part, group) + g
    there = (g < group)[:, None] & (e < dv)[None, :]
    if WHOLE:
        out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(
            out_ptr + offset(row, dv)[:, None] + e[None, :], out.to(out_ptr.dtype.element_ty), mask=there
        )
    else:
        rows = offset(tl.num_programs(0) * tl.num_programs(1), group)
        tl.store(sum_ptr + offset(row, dv)[:, None] + e[None, :], acc, mask=there)
        tl.store(top_ptr + row, top, mask=g < group)
        tl.store(top_ptr + rows + row, total, mask=g < group)


@triton.jit
def join_kernel(
    sum_ptr, top_ptr, out_ptr, group, dv, parts, G_PAD: tl.constexpr, DV_PAD: tl.constexpr
):  # fmt: skip
    """Program p: adds up the parts of group p, always in the same order."""
    pid = tl.program_id(0)
    g, e = tl.arange(0, G_PAD), tl.arange(0, DV_PAD)
    there = (g < group)[:, None] & (e < dv)[None, :]
    rows = offset(tl.num_programs(0) * parts, group)
    top = tl.full((G_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    acc = tl.zeros((G_PAD, DV_PAD), tl.float32)
    for part in range(parts):
        row = offset(pid * parts + part, group) + g
        its_top = tl.load(top_ptr + row, mask=g < group, other=float("-inf"))
        higher = tl.maximum(top, its_top)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, grow = tl.exp2(top - base), tl.exp2(its_top - base)
        total = total * shrink + grow * tl.load(top_ptr + rows + row, mask=g < group, other=0.0)
        its = tl.load(sum_ptr + offset(row, dv)[:, None] + e[None, :], mask=there, other=0.0)
        acc = acc * shrink[:, None] + grow[:, None] * its
        top = higher
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    at = offset(offset(pid, group) + g, dv)[:, None] + e[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=there)
