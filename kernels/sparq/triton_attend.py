"""The second half of SparQ decoding in Triton: attention over the chosen positions, the mean value for the others.

Working layouts, with P = B * Hkv groups of G heads: positions (P, topk), negative where there is none; each part of
them leaves its unfinished sums, which a second launch adds up in order, unless there is one part only.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels._triton import await_launch, dot, dot_precision, next_power_of_two, offset
from attnopt.kernels.sparq import steps
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import Tiles, ordered
from attnopt.kernels.sparq.triton_score import Scores, as_bytes, softmax_of_splits
from attnopt.kernels.sparq.triton_select import Chosen, range_of
from attnopt.kernels.sparq.triton_start import LOG2E, strides_of

#: Channels that are summed one after the other in fp32, as multiply-adds do; above it the rounding errors add up.
EXACT_CHUNK = 32


def attend(request: Request, choice: Chosen | None, scores: Scores | None, tiles: Tiles) -> Tensor:
    """(B, H, 1, Dv): exact attention over the chosen positions, all when None; the mean value for what they leave out.

    The mean value is blended in when the request asks for it and there are scores to weigh it with.
    """
    kept, k, group = request.kept, request.k, request.group
    positions = None if choice is None else choice.positions
    groups, chosen = k.shape[0] * k.shape[1], k.shape[2] if positions is None else positions.shape[1]
    parts = triton.cdiv(chosen, tiles.chosen_split)
    rest, out = Rest.of(request, choice, scores), request.output()
    partial = _Partial.of(out, groups, parts, group) if parts > 1 else _Partial()
    _attend[(groups, parts)](
        *pointers(request, rest, out), as_bytes(kept), positions, request.starts, request.lengths,
        partial.acc, partial.top, partial.total, partial.covered,
        *strides(request, rest), *strides_of(kept, 2),
        *numbers(request, rest), chosen, tiles.chosen_split, request.grown,
        HAS_POSITIONS=positions is not None, IS_WHOLE=parts == 1, **sizes(request, rest, tiles),
        **ordered(early=tiles.early), num_warps=8 if _is_heavy(request) else 4,
    )  # fmt: skip
    if parts > 1:
        _merge[(groups,)](
            partial.acc, partial.top, partial.total, partial.covered, rest.mean, rest.there, out,
            *strides_of(rest.mean, 3), k.shape[1], group, out.shape[3], chosen, parts,
            G_PAD=next_power_of_two(group), DV_PAD=next_power_of_two(out.shape[3]), BLEND=rest.mean is not None,
            **ordered(early=tiles.early),
        )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True, eq=False)
class Rest:
    """What blending in the mean value needs, or nothing of it; there (P,) says whether any position is left out."""

    mean: Tensor | None = None
    there: Tensor | None = None
    logits: Tensor | None = None
    part_max: Tensor | None = None
    part_sum: Tensor | None = None
    splits: int = 1

    @staticmethod
    def of(request: Request, choice: Chosen | None, scores: Scores | None) -> "Rest":
        if scores is None or choice is None or not request.mean_value:
            return Rest()
        mean, splits = steps.mean_of_values(request), scores.part_max.shape[1]
        return Rest(mean, choice.there, scores.logits, scores.part_max, scores.part_sum, splits)


def pointers(request: Request, rest: Rest, out: Tensor) -> tuple[Tensor | None, ...]:
    """Of `attend_part`, in its order, as the next three."""
    held = (rest.logits, rest.part_max, rest.part_sum, rest.mean, rest.there)
    return (request.q, request.k, request.v, *held, out)


def strides(request: Request, rest: Rest) -> tuple[int, ...]:
    """Of queries, keys, values and their mean."""
    q = request.q.stride()
    return (q[0], q[1], q[3], *request.k.stride(), *request.v.stride(), *strides_of(rest.mean, 3))


def numbers(request: Request, rest: Rest) -> tuple[float, ...]:
    """Sizes known at launch."""
    _, kv_heads, sk, d = request.k.shape
    return kv_heads, request.group, d, request.v.shape[3], sk, rest.splits, request.scale


def sizes(request: Request, rest: Rest, tiles: Tiles) -> dict[str, Any]:
    """Sizes known when compiled."""
    d_pad, is_small = next_power_of_two(request.q.shape[3]), request.q.itemsize < 4
    return {
        "G_PAD": next_power_of_two(request.group), "DV_PAD": next_power_of_two(request.v.shape[3]),
        "BLEND": rest.mean is not None, "D_PAD": d_pad, "CHUNK": d_pad if is_small else min(d_pad, EXACT_CHUNK),
        "SPLITS_PAD": triton.next_power_of_2(rest.splits), "BLOCK": tiles.chosen_block,
        "PRECISION": dot_precision(request.q.dtype),
    }  # fmt: skip


def _is_heavy(request: Request) -> bool:
    return request.q.itemsize * max(request.q.shape[3], request.v.shape[3]) > 512


@dataclass(frozen=True, slots=True, eq=False)
class _Partial:
    """Unfinished attention of each part: acc (P, parts, G, Dv); top, total, covered (P, parts, G); all fp32."""

    acc: Tensor | None = None
    top: Tensor | None = None
    total: Tensor | None = None
    covered: Tensor | None = None

    @staticmethod
    def of(out: Tensor, groups: int, parts: int, group: int) -> "_Partial":
        rows = [out.new_empty(groups, parts, group, dtype=torch.float32) for _ in range(3)]
        return _Partial(out.new_empty(groups, parts, group, out.shape[3], dtype=torch.float32), *rows)


@triton.jit
def _attend(
    q_ptr, k_ptr, v_ptr, logits_ptr, max_ptr, sum_ptr, mean_ptr, there_ptr, out_ptr,
    kept_ptr, positions_ptr, starts_ptr, lengths_ptr, acc_ptr, top_ptr, total_ptr, covered_ptr,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, mean_sb, mean_sh, mean_sd, kept_sb, kept_sn,
    kv_heads, group, d, dv, sk, splits, scale, chosen, split, grown,
    HAS_POSITIONS: tl.constexpr, IS_WHOLE: tl.constexpr, G_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLEND: tl.constexpr, D_PAD: tl.constexpr, CHUNK: tl.constexpr, SPLITS_PAD: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (p, j): attention of group p over part j of its positions, finished at once when there is one part."""
    await_launch(EARLY)
    attend_part(
        q_ptr, k_ptr, v_ptr, logits_ptr, max_ptr, sum_ptr, mean_ptr, there_ptr, out_ptr,
        kept_ptr, positions_ptr, starts_ptr, lengths_ptr, acc_ptr, top_ptr, total_ptr, covered_ptr,
        q_sb, q_sh, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, mean_sb, mean_sh, mean_sd, kept_sb, kept_sn,
        tl.program_id(0), tl.program_id(1), tl.num_programs(1),
        kv_heads, group, d, dv, sk, splits, scale, chosen, split, grown,
        HAS_POSITIONS, IS_WHOLE, G_PAD, DV_PAD, BLEND, D_PAD, CHUNK, SPLITS_PAD, BLOCK, PRECISION,
    )  # fmt: skip


@triton.jit
def attend_part(
    q_ptr, k_ptr, v_ptr, logits_ptr, max_ptr, sum_ptr, mean_ptr, there_ptr, out_ptr,
    kept_ptr, positions_ptr, starts_ptr, lengths_ptr, acc_ptr, top_ptr, total_ptr, covered_ptr,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, mean_sb, mean_sh, mean_sd, kept_sb, kept_sn,
    pid, part, parts, kv_heads, group, d, dv, sk, splits, scale, chosen, split, grown,
    HAS_POSITIONS: tl.constexpr, IS_WHOLE: tl.constexpr, G_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    BLEND: tl.constexpr, D_PAD: tl.constexpr, CHUNK: tl.constexpr, SPLITS_PAD: tl.constexpr,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of group `pid` over one part of its positions: the output if it is the only one, else its sums."""
    b, h = pid // kv_heads, pid % kv_heads
    g, e = tl.arange(0, G_PAD), tl.arange(0, DV_PAD)
    q_row = q_ptr + offset(b, q_sb) + offset(h * group + g, q_sh)[:, None]
    c, is_head = tl.arange(0, CHUNK), (g < group)[:, None]
    first_q = _channels(q_row, q_sd, c[None, :], d, is_head)
    k_head = k_ptr + offset(b, k_sb) + offset(h, k_sh)
    v_row = v_ptr + offset(b, v_sb) + offset(h, v_sh) + offset(e, v_sd)[None, :]
    row = offset(pid, group) + g

    first, last = range_of(starts_ptr, lengths_ptr, b, sk, grown)
    factor = scale * LOG2E
    top = tl.full((G_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    covered = tl.zeros((G_PAD,), tl.float32)
    acc = tl.zeros((G_PAD, DV_PAD), tl.float32)
    if BLEND:
        score_base, score_total = softmax_of_splits(max_ptr, sum_ptr, pid, group, splits, G_PAD, SPLITS_PAD)
    for start in range(0, tl.minimum(split, chosen - part * split), BLOCK):
        slot = part * split + start + tl.arange(0, BLOCK)
        seen = slot < chosen
        pos = slot.to(tl.int64)
        if HAS_POSITIONS:
            pos = tl.load(positions_ptr + offset(pid, chosen) + slot, mask=seen, other=-1).to(tl.int64)
            seen &= pos >= 0
        else:
            seen &= (pos >= first) & (pos < last)
            if kept_ptr is not None:
                seen &= tl.load(kept_ptr + offset(b, kept_sb) + offset(pos, kept_sn), mask=seen, other=0) != 0
        k_column = k_head + offset(pos, k_sn)[None, :]
        # A factor on each part: without one the parts would become one chain of multiply-adds.
        s = dot(first_q, _channels(k_column, k_sd, c[:, None], d, seen[None, :]), PRECISION) * factor
        for at in tl.static_range(CHUNK, D_PAD, CHUNK):
            q = _channels(q_row, q_sd, (at + c)[None, :], d, is_head)
            s += dot(q, _channels(k_column, k_sd, (at + c)[:, None], d, seen[None, :]), PRECISION) * factor
        v = tl.load(v_row + offset(pos, v_sn)[:, None], mask=seen[:, None] & (e < dv)[None, :], other=0.0)
        s = tl.where(seen[None, :], s, float("-inf"))
        new = tl.maximum(top, tl.max(s, axis=1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        acc = acc * shrink[:, None] + dot(p.to(v.dtype), v, PRECISION)
        top = new
        if BLEND:
            a = tl.load(
                logits_ptr + offset(row, sk)[:, None] + pos[None, :],
                mask=(g < group)[:, None] & seen[None, :], other=float("-inf"),
            )  # fmt: skip
            covered += tl.sum(tl.exp2(a - score_base[:, None]), axis=1) / score_total

    if IS_WHOLE:
        mean_at = (
            mean_ptr + (offset(b, mean_sb) + offset(h, mean_sh) + offset(e, mean_sd)) if BLEND else mean_ptr
        )
        out = _finish(acc, total, covered, mean_at, there_ptr, pid, dv, chosen, BLEND, DV_PAD)
        there = (g < group)[:, None] & (e < dv)[None, :]
        tl.store(
            out_ptr + offset(row, dv)[:, None] + e[None, :], out.to(out_ptr.dtype.element_ty), mask=there
        )
    else:
        at = offset(pid * parts + part, group) + g
        tl.store(top_ptr + at, top, mask=g < group)
        tl.store(total_ptr + at, total, mask=g < group)
        tl.store(covered_ptr + at, covered, mask=g < group)
        tl.store(
            acc_ptr + offset(at, dv)[:, None] + e[None, :], acc, mask=(g < group)[:, None] & (e < dv)[None, :]
        )


@triton.jit
def _channels(row, stride, c, d, there):
    """Channels c, of d, of the rows that begin at `row`, either way round; zero for rows that are not there."""
    return tl.load(row + offset(c, stride), mask=there & (c < d), other=0.0)


@triton.jit
def _finish(
    acc, total, covered, mean_at, there_ptr, pid, dv, chosen, BLEND: tl.constexpr, DV_PAD: tl.constexpr
):
    """(G_PAD, DV_PAD) fp32: the normalised sum, zero where no key was seen, and the mean value for what is left out."""
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    if BLEND:
        mean = tl.load(mean_at, mask=tl.arange(0, DV_PAD) < dv, other=0.0)
        blended = covered[:, None] * out + (1.0 - covered)[:, None] * mean[None, :]
        # All that is there was chosen: nothing is left for the mean value.
        out = tl.where(tl.load(there_ptr + pid) <= chosen, out, blended)
    return out


@triton.jit
def _merge(
    acc_ptr, top_ptr, total_ptr, covered_ptr, mean_ptr, there_ptr, out_ptr,
    mean_sb, mean_sh, mean_sd,
    kv_heads, group, dv, chosen, parts,
    G_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLEND: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program p: adds up the parts of group p in order, and finishes."""
    await_launch(EARLY)
    pid = tl.program_id(0)
    b, h = pid // kv_heads, pid % kv_heads
    g, e = tl.arange(0, G_PAD), tl.arange(0, DV_PAD)
    there = (g < group)[:, None] & (e < dv)[None, :]
    top = tl.full((G_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((G_PAD,), tl.float32)
    covered = tl.zeros((G_PAD,), tl.float32)
    acc = tl.zeros((G_PAD, DV_PAD), tl.float32)
    for part in range(parts):
        at = offset(pid * parts + part, group) + g
        part_top = tl.load(top_ptr + at, mask=g < group, other=float("-inf"))
        new = tl.maximum(top, part_top)
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink, grow = tl.exp2(top - base), tl.exp2(part_top - base)
        total = total * shrink + grow * tl.load(total_ptr + at, mask=g < group, other=0.0)
        covered += tl.load(covered_ptr + at, mask=g < group, other=0.0)
        part_acc = tl.load(acc_ptr + offset(at, dv)[:, None] + e[None, :], mask=there, other=0.0)
        acc = acc * shrink[:, None] + grow[:, None] * part_acc
        top = new
    mean_at = mean_ptr + (offset(b, mean_sb) + offset(h, mean_sh) + offset(e, mean_sd)) if BLEND else mean_ptr
    out = _finish(acc, total, covered, mean_at, there_ptr, pid, dv, chosen, BLEND, DV_PAD)
    tl.store(out_ptr + offset(offset(pid, group) + g, dv)[:, None] + e[None, :], out.to(out_ptr.dtype.element_ty),
             mask=there)  # fmt: skip
