"""Triton backward: gradients by block of keys, then by block of queries, each summed inside one program: no atomics.

FlashAttention-2 (arXiv 2307.08691, algorithm 2) split in two, with the tiles that nobody sees left out. Transposed
products are formed from operands loaded for them, never from a transposed accumulator (fla issue 640: wrong
gradients on Hopper). Sink columns are seen by every query: the rows beyond their window are summed in parts by
programs of their own, whose tile is as narrow as the sinks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels._triton import dot, next_power_of_two, offset, on_device_of
from attnopt.kernels.streaming.problem import (
    Answer,
    Gradients,
    Problem,
    add_mean_gradient,
    sink_gradient,
)
from attnopt.kernels.streaming.triton_tiles import (
    BY_KEYS,
    BY_QUERIES,
    LOG2E,
    Tiles,
    choose,
    kept,
    load_rows,
    logits,
    scalars,
    shared_memory,
    signed,
    split,
    store_rows,
    strides,
    tanh,
)

#: Queries beyond the window that one program sums for the sink columns, and the most such programs for a head.
FAR_ROWS, MOST_PARTS = 1024, 32


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """One number per query, fp32 (B, H, Sq): weights are exp2(unit * (x - peak) - tail), or without peak if PLAIN."""

    delta: Tensor
    peak: Tensor
    tail: Tensor


def launch(
    problem: Problem,
    answer: Answer,
    do: Tensor,
    dlse: Tensor | None,
    by_keys: Tiles | None = None,
    by_queries: Tiles | None = None,
) -> Gradients:
    """Gradients of q, k, v and the sink logits (none of the bias); no dimension may be empty."""
    q, k, v = problem.q, problem.k, problem.v
    room = {
        "d": q.shape[3],
        "dv": v.shape[3],
        "itemsize": q.element_size(),
        "shared": shared_memory(q.device),
    }
    upstream = _live(problem, answer, do)
    with on_device_of(q):
        rows = _prepare(problem, answer, upstream, dlse)
        common = _common(problem, upstream, rows)
        dk, dv = _keys(problem, common, by_keys or choose(BY_KEYS, **room))
        dq = _queries(problem, common, by_queries or choose(BY_QUERIES, **room))
    return Gradients(
        dq, dk, add_mean_gradient(problem, answer, do, dv).to(v.dtype), None, sink_gradient(problem, answer, rows.delta)
    )


def _live(problem: Problem, answer: Answer, do: Tensor) -> Tensor:
    """`do` without what arrives at empty rows, which would make 0 * NaN of a NaN there."""
    return do.masked_fill(torch.isneginf(answer.lse)[..., None], 0.0) if problem.may_leave_rows_empty else do


def _common(problem: Problem, do: Tensor, rows: Rows) -> dict[str, Any]:
    """What both kernels take, by the names of their parameters."""
    q, k, v = problem.q, problem.k, problem.v
    pointers = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "do_ptr": do}
    statistics = {"delta_ptr": rows.delta, "peak_ptr": rows.peak, "tail_ptr": rows.tail}
    sizes = {"heads": q.shape[1], "group": problem.group, "D": q.shape[3], "DV": v.shape[3]}
    padded = {"D_PAD": next_power_of_two(q.shape[3]), "DV_PAD": next_power_of_two(v.shape[3])}
    steps = strides("q", q) | strides("k", k) | strides("v", v) | strides("do", do)
    return pointers | statistics | sizes | padded | steps | scalars(problem)


def _prepare(problem: Problem, answer: Answer, do: Tensor, dlse: Tensor | None) -> Rows:
    batch, heads, n_rows, dv = do.shape
    rows = Rows(*(torch.empty_like(answer.lse, memory_format=torch.contiguous_format) for _ in range(3)))
    prepare_kernel[(batch * heads * triton.cdiv(n_rows, 64),)](
        answer.o,
        do,
        answer.lse.contiguous(),
        answer.log_sum.contiguous(),
        answer.lse if dlse is None else dlse.contiguous(),
        rows.delta,
        rows.peak,
        rows.tail,
        *answer.o.stride(),
        *do.stride(),
        heads,
        n_rows,
        PLAIN=scalars(problem)["PLAIN"],
        DLSE=dlse is not None,
        DV=dv,
        DV_PAD=next_power_of_two(dv),
        BLOCK=64,
    )
    return rows


def _keys(problem: Problem, common: dict[str, Any], tiles: Tiles) -> tuple[Tensor, Tensor]:
    """dk and dv, (B, Hkv, Sk, .)."""
    k, v = problem.k, problem.v
    batch, kv_heads, columns, _ = k.shape
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    far_dk, far_dv = _far(problem, common, tiles)
    keys_kernel[(batch * kv_heads * triton.cdiv(columns, tiles.keys),)](
        **common,
        dk_ptr=dk,
        dv_ptr=dv,
        far_dk_ptr=far_dk,
        far_dv_ptr=far_dv,
        parts=far_dk.shape[1],
        factor=abs(problem.scale),
        BLOCK_Q=tiles.queries,
        BLOCK_K=tiles.keys,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return dk, dv


def _far(problem: Problem, common: dict[str, Any], tiles: Tiles) -> tuple[Tensor, Tensor]:
    """What queries beyond the window add to dk and dv of the sinks: fp32 (B * Hkv, parts, sinks, .)."""
    where, (batch, kv_heads, columns, d), dv = problem.reach, problem.k.shape, problem.v.shape[3]
    far_rows = where.rows - max(0, min(tiles.keys, columns) - 1 - where.lower)
    sinks = where.sinks if where.windowed and far_rows > 0 else 0
    parts = min(MOST_PARTS, triton.cdiv(far_rows, FAR_ROWS)) if sinks else 0
    far_dk, far_dv = (problem.k.new_empty((batch * kv_heads, parts, sinks, n), dtype=torch.float32) for n in (d, dv))
    if sinks:
        width = min(tiles.keys, next_power_of_two(sinks))
        far_kernel[(batch * kv_heads * parts * triton.cdiv(sinks, width),)](
            **common,
            dk_ptr=far_dk,
            dv_ptr=far_dv,
            parts=parts,
            BLOCK_Q=tiles.queries,
            BLOCK_K=tiles.keys,
            BLOCK_SINK=width,
            num_warps=4,
            num_stages=tiles.stages,
        )
    return far_dk, far_dv


def _queries(problem: Problem, common: dict[str, Any], tiles: Tiles) -> Tensor:
    """dq, (B, H, Sq, D)."""
    q, head = problem.q, problem.reach.head
    batch, heads, n_rows, _ = q.shape
    dq = q.new_empty(q.shape)
    queries_kernel[(batch * heads * triton.cdiv(n_rows, tiles.queries),)](
        **common,
        dq_ptr=dq,
        factor=problem.scale,
        HEAD=head > 0,
        BLOCK_Q=tiles.queries,
        BLOCK_K=tiles.keys,
        BLOCK_HEAD=min(tiles.keys, next_power_of_two(head)),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return dq


@triton.jit
def prepare_kernel(
    o_ptr, do_ptr, lse_ptr, log_sum_ptr, dlse_ptr, delta_ptr, peak_ptr, tail_ptr,
    o_sb, o_sh, o_ss, o_sd, do_sb, do_sh, do_ss, do_sd, heads, n_rows,
    PLAIN: tl.constexpr, DLSE: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """delta, peak, tail of BLOCK queries of one head; an empty row gets a tail of +inf, so that it weighs nothing."""
    blocks = tl.cdiv(n_rows, BLOCK)
    bh, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    b, h = bh // heads, bh % heads
    rows = block * BLOCK + tl.arange(0, BLOCK)
    exists = rows < n_rows
    o = load_rows(o_ptr + offset(b, o_sb) + offset(h, o_sh), rows, o_ss, o_sd, exists, DV, DV_PAD)
    do = load_rows(do_ptr + offset(b, do_sb) + offset(h, do_sh), rows, do_ss, do_sd, exists, DV, DV_PAD)
    at = offset(bh, n_rows) + rows
    lse = tl.load(lse_ptr + at, mask=exists, other=-float("inf"))
    log_sum = tl.load(log_sum_ptr + at, mask=exists, other=0.0)
    empty = lse == -float("inf")
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE:
        delta -= tl.load(dlse_ptr + at, mask=exists, other=0.0)
    tail = (lse if PLAIN else log_sum) * LOG2E
    tl.store(delta_ptr + at, tl.where(empty, 0.0, delta), mask=exists)
    tl.store(peak_ptr + at, tl.where(empty, 0.0, lse - log_sum), mask=exists)
    tl.store(tail_ptr + at, tl.where(empty, float("inf"), tail), mask=exists)


@triton.jit
def recall(x, peak, tail, unit, PLAIN: tl.constexpr):
    """The softmax weights of a tile, from its logits and the statistics of its rows."""
    if PLAIN:
        return tl.exp2(x * unit - tail)
    return tl.exp2((x - peak) * unit - tail)


@triton.jit
def keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, far_dk_ptr, far_dv_ptr, delta_ptr, peak_ptr, tail_ptr,
    bias_ptr, mask_ptr, keep_ptr,
    q_sb, q_sh, q_ss, q_sd, k_sb, k_sh, k_ss, k_sd, v_sb, v_sh, v_ss, v_sd, do_sb, do_sh, do_ss, do_sd,
    bias_sb, bias_sh, bias_sq, bias_sk, mask_sb, mask_sh, mask_sq, mask_sk, keep_sb, keep_ss,
    heads, group, n_rows, n_cols, upper, lower, sinks, prefix, parts, unit, scale, softcap, factor,
    SIGN: tl.constexpr, WINDOWED: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, PADDING: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr,
    DV_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv of BLOCK_K keys of one kv head, over the queries of its group that see them."""
    blocks = tl.cdiv(n_cols, BLOCK_K)
    bh, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    kv_heads = heads // group
    b, kv_head = bh // kv_heads, bh % kv_heads
    first = block * BLOCK_K
    last = tl.minimum(first + BLOCK_K, n_cols)

    cols = first + tl.arange(0, BLOCK_K)
    keep = kept(keep_ptr + offset(b, keep_sb), cols, keep_ss, n_cols, PADDING)
    k = load_rows(k_ptr + offset(b, k_sb) + offset(kv_head, k_sh), cols, k_ss, k_sd, keep, D, D_PAD)
    v = load_rows(v_ptr + offset(b, v_sb) + offset(kv_head, v_sh), cols, v_ss, v_sd, keep, DV, DV_PAD)
    dk = tl.zeros((BLOCK_K, D_PAD), dtype=tl.float32)
    dv = tl.zeros((BLOCK_K, DV_PAD), dtype=tl.float32)
    if first < sinks:
        for part in range(0, parts):
            at = offset(bh * parts + part, sinks)
            dk += load_rows(far_dk_ptr + at * D, cols, D, 1, cols < sinks, D, D_PAD)
            dv += load_rows(far_dv_ptr + at * DV, cols, DV, 1, cols < sinks, DV, DV_PAD)

    start = tl.maximum(first - upper, 0)
    stop = tl.minimum(last - 1 - lower, n_rows) if WINDOWED else n_rows
    full_start = last - 1 - upper
    full_stop = first - lower if WINDOWED else n_rows
    start = tl.where(first < prefix, 0, start)
    stop = tl.where(first < prefix, n_rows, stop)
    full_start = tl.where(last <= prefix, 0, full_start)
    full_stop = tl.where(last <= prefix, n_rows, full_stop)
    before, full, partial, after = split(start, stop, full_start, full_stop, BLOCK_Q)
    for g in range(0, group):
        h = kv_head * group + g
        at = offset(b * heads + h, n_rows)
        for n in range(0, before + after):
            i = start + n * BLOCK_Q + tl.where(n < before, 0, partial - full)
            dk, dv = visit_keys(
                dk, dv, k, v, i + tl.arange(0, BLOCK_Q), cols, keep, n_cols,
                q_ptr + offset(b, q_sb) + offset(h, q_sh), q_ss, q_sd,
                do_ptr + offset(b, do_sb) + offset(h, do_sh), do_ss, do_sd,
                delta_ptr + at, peak_ptr + at, tail_ptr + at,
                bias_ptr + offset(b, bias_sb) + offset(h, bias_sh), bias_sq, bias_sk,
                mask_ptr + offset(b, mask_sb) + offset(h, mask_sh), mask_sq, mask_sk,
                stop, upper, lower, sinks, prefix, unit, scale, softcap,
                True, WINDOWED, SIGN, PLAIN, CAPPED, BIAS, MASK, PADDING, D, D_PAD, DV, DV_PAD, PRECISION,
            )  # fmt: skip
        for i in range(full, partial, BLOCK_Q):
            dk, dv = visit_keys(
                dk, dv, k, v, i + tl.arange(0, BLOCK_Q), cols, keep, n_cols,
                q_ptr + offset(b, q_sb) + offset(h, q_sh), q_ss, q_sd,
                do_ptr + offset(b, do_sb) + offset(h, do_sh), do_ss, do_sd,
                delta_ptr + at, peak_ptr + at, tail_ptr + at,
                bias_ptr + offset(b, bias_sb) + offset(h, bias_sh), bias_sq, bias_sk,
                mask_ptr + offset(b, mask_sb) + offset(h, mask_sh), mask_sq, mask_sk,
                stop, upper, lower, sinks, prefix, unit, scale, softcap,
                False, WINDOWED, SIGN, PLAIN, CAPPED, BIAS, MASK, PADDING, D, D_PAD, DV, DV_PAD, PRECISION,
            )  # fmt: skip

    done = offset(bh, n_cols)
    exists = cols < n_cols
    store_rows(dk_ptr + done * D, cols, D, dk * factor, exists, D, D_PAD)
    store_rows(dv_ptr + done * DV, cols, DV, dv, exists, DV, DV_PAD)


@triton.jit
def far_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, delta_ptr, peak_ptr, tail_ptr, bias_ptr, mask_ptr, keep_ptr,
    q_sb, q_sh, q_ss, q_sd, k_sb, k_sh, k_ss, k_sd, v_sb, v_sh, v_ss, v_sd, do_sb, do_sh, do_ss, do_sd,
    bias_sb, bias_sh, bias_sq, bias_sk, mask_sb, mask_sh, mask_sq, mask_sk, keep_sb, keep_ss,
    heads, group, n_rows, n_cols, upper, lower, sinks, prefix, parts, unit, scale, softcap,
    SIGN: tl.constexpr, WINDOWED: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, PADDING: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr,
    DV_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SINK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of the sums over the queries that `keys_kernel` leaves out, for BLOCK_SINK sink columns."""
    blocks = tl.cdiv(sinks, BLOCK_SINK)
    first = tl.program_id(0) % blocks * BLOCK_SINK
    piece = tl.program_id(0) // blocks
    bh, part = piece // parts, piece % parts
    kv_heads = heads // group
    b, kv_head = bh // kv_heads, bh % kv_heads

    cols = first + tl.arange(0, BLOCK_SINK)
    keep = kept(keep_ptr + offset(b, keep_sb), cols, keep_ss, sinks, PADDING)
    k = load_rows(k_ptr + offset(b, k_sb) + offset(kv_head, k_sh), cols, k_ss, k_sd, keep, D, D_PAD)
    v = load_rows(v_ptr + offset(b, v_sb) + offset(kv_head, v_sh), cols, v_ss, v_sd, keep, DV, DV_PAD)
    dk = tl.zeros((BLOCK_SINK, D_PAD), dtype=tl.float32)
    dv = tl.zeros((BLOCK_SINK, DV_PAD), dtype=tl.float32)

    # The rows from where the block of `keys_kernel` that holds these columns stops, in equal parts.
    block = first // BLOCK_K * BLOCK_K
    begin = tl.maximum(tl.minimum(block + BLOCK_K, n_cols) - 1 - lower, 0)
    begin = tl.where(block < prefix, n_rows, begin)
    share = tl.cdiv(tl.cdiv(tl.maximum(n_rows - begin, 0), parts), BLOCK_Q) * BLOCK_Q
    start = begin + part * share
    stop = tl.minimum(start + share, n_rows)
    for g in range(0, group):
        h = kv_head * group + g
        at = offset(b * heads + h, n_rows)
        for i in range(start, stop, BLOCK_Q):
            dk, dv = visit_keys(
                dk, dv, k, v, i + tl.arange(0, BLOCK_Q), cols, keep, sinks,
                q_ptr + offset(b, q_sb) + offset(h, q_sh), q_ss, q_sd,
                do_ptr + offset(b, do_sb) + offset(h, do_sh), do_ss, do_sd,
                delta_ptr + at, peak_ptr + at, tail_ptr + at,
                bias_ptr + offset(b, bias_sb) + offset(h, bias_sh), bias_sq, bias_sk,
                mask_ptr + offset(b, mask_sb) + offset(h, mask_sh), mask_sq, mask_sk,
                stop, upper, lower, sinks, prefix, unit, scale, softcap,
                True, WINDOWED, SIGN, PLAIN, CAPPED, BIAS, MASK, PADDING, D, D_PAD, DV, DV_PAD, PRECISION,
            )  # fmt: skip

    exists = cols < sinks
    done = offset(piece, sinks)
    store_rows(dk_ptr + done * D, cols, D, dk, exists, D, D_PAD)
    store_rows(dv_ptr + done * DV, cols, DV, dv, exists, DV, DV_PAD)


@triton.jit
def visit_keys(
    dk, dv, k, v, rows, cols, keep, limit, q_ptr, q_ss, q_sd, do_ptr, do_ss, do_sd, delta_ptr, peak_ptr, tail_ptr,
    bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
    stop, upper, lower, sinks, prefix, unit, scale, softcap,
    STRUCTURED: tl.constexpr, WINDOWED: tl.constexpr, SIGN: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the queries `rows` before `stop` send to a block of keys; the tile is transposed, (keys, queries)."""
    exists = rows < stop
    q = signed(load_rows(q_ptr, rows, q_ss, q_sd, exists, D, D_PAD), SIGN)
    scores = dot(k, tl.trans(q), PRECISION)
    x = logits(
        scores, rows[None, :], cols[:, None], limit, keep[:, None],
        stop, upper, lower, sinks, prefix, bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
        scale, softcap, STRUCTURED, WINDOWED, PLAIN, CAPPED, BIAS, MASK, PADDING,
    )  # fmt: skip
    peak = tl.load(peak_ptr + rows, mask=exists, other=0.0)
    tail = tl.load(tail_ptr + rows, mask=exists, other=float("inf"))
    weights = recall(x, peak[None, :], tail[None, :], unit, PLAIN)
    do = load_rows(do_ptr, rows, do_ss, do_sd, exists, DV, DV_PAD)
    dv += dot(weights.to(do.dtype), do, PRECISION)
    delta = tl.load(delta_ptr + rows, mask=exists, other=0.0)
    dscores = weights * (dot(v, tl.trans(do), PRECISION) - delta[None, :])
    if CAPPED:
        dscores *= slope(scores, scale, softcap)
    dk += dot(dscores.to(q.dtype), q, PRECISION)
    return dk, dv


@triton.jit
def slope(scores, scale, softcap):
    """The derivative of softcap * tanh(x / softcap) at the scaled scores."""
    capped = tanh(scores * scale / softcap)
    return 1 - capped * capped


@triton.jit
def queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, delta_ptr, peak_ptr, tail_ptr, bias_ptr, mask_ptr, keep_ptr,
    q_sb, q_sh, q_ss, q_sd, k_sb, k_sh, k_ss, k_sd, v_sb, v_sh, v_ss, v_sd, do_sb, do_sh, do_ss, do_sd,
    bias_sb, bias_sh, bias_sq, bias_sk, mask_sb, mask_sh, mask_sq, mask_sk, keep_sb, keep_ss,
    heads, group, n_rows, n_cols, upper, lower, sinks, prefix, unit, scale, softcap, factor,
    SIGN: tl.constexpr, WINDOWED: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, PADDING: tl.constexpr, HEAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of BLOCK_Q queries of one head, over the tiles that the forward visits."""
    blocks = tl.cdiv(n_rows, BLOCK_Q)
    bh = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, n_rows)
    b, h = bh // heads, bh % heads

    rows = first + tl.arange(0, BLOCK_Q)
    exists = rows < n_rows
    q = load_rows(q_ptr + offset(b, q_sb) + offset(h, q_sh), rows, q_ss, q_sd, exists, D, D_PAD)
    q = signed(q, SIGN)
    do = load_rows(do_ptr + offset(b, do_sb) + offset(h, do_sh), rows, do_ss, do_sd, exists, DV, DV_PAD)
    at = offset(bh, n_rows) + rows
    delta = tl.load(delta_ptr + at, mask=exists, other=0.0)
    peak = tl.load(peak_ptr + at, mask=exists, other=0.0)
    tail = tl.load(tail_ptr + at, mask=exists, other=float("inf"))
    k_ptr += offset(b, k_sb) + offset(h // group, k_sh)
    v_ptr += offset(b, v_sb) + offset(h // group, v_sh)
    bias_ptr += offset(b, bias_sb) + offset(h, bias_sh)
    mask_ptr += offset(b, mask_sb) + offset(h, mask_sh)
    keep_ptr += offset(b, keep_sb)

    dq = tl.zeros((BLOCK_Q, D_PAD), dtype=tl.float32)
    head = 0
    if HEAD:
        head = tl.maximum(prefix, tl.minimum(sinks, last + upper))
        for j in range(0, head, BLOCK_HEAD):
            dq = visit_queries(
                dq, q, do, rows, j + tl.arange(0, BLOCK_HEAD), head, delta, peak, tail,
                k_ptr, k_ss, k_sd, v_ptr, v_ss, v_sd, keep_ptr, keep_ss,
                bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
                n_rows, upper, lower, sinks, prefix, unit, scale, softcap,
                True, WINDOWED, PLAIN, CAPPED, BIAS, MASK, PADDING, D, D_PAD, DV, DV_PAD, PRECISION,
            )  # fmt: skip

    start = tl.maximum(first + lower + 1, head) if WINDOWED else head
    full_start = last + lower if WINDOWED else start
    before, full, partial, after = split(
        start, tl.minimum(last + upper, n_cols), full_start, tl.minimum(first + upper + 1, n_cols), BLOCK_K
    )
    for n in range(0, before + after):
        j = start + n * BLOCK_K + tl.where(n < before, 0, partial - full)
        dq = visit_queries(
            dq, q, do, rows, j + tl.arange(0, BLOCK_K), n_cols, delta, peak, tail,
            k_ptr, k_ss, k_sd, v_ptr, v_ss, v_sd, keep_ptr, keep_ss,
            bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
            n_rows, upper, lower, sinks, prefix, unit, scale, softcap,
            True, WINDOWED, PLAIN, CAPPED, BIAS, MASK, PADDING, D, D_PAD, DV, DV_PAD, PRECISION,
        )  # fmt: skip
    for j in range(full, partial, BLOCK_K):
        dq = visit_queries(
            dq, q, do, rows, j + tl.arange(0, BLOCK_K), n_cols, delta, peak, tail,
            k_ptr, k_ss, k_sd, v_ptr, v_ss, v_sd, keep_ptr, keep_ss,
            bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
            n_rows, upper, lower, sinks, prefix, unit, scale, softcap,
            False, WINDOWED, PLAIN, CAPPED, BIAS, MASK, PADDING, D, D_PAD, DV, DV_PAD, PRECISION,
        )  # fmt: skip

    store_rows(dq_ptr + offset(bh, n_rows) * D, rows, D, dq * factor, exists, D, D_PAD)


@triton.jit
def visit_queries(
    dq, q, do, rows, cols, limit, delta, peak, tail,
    k_ptr, k_ss, k_sd, v_ptr, v_ss, v_sd, keep_ptr, keep_ss,
    bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
    n_rows, upper, lower, sinks, prefix, unit, scale, softcap,
    STRUCTURED: tl.constexpr, WINDOWED: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the keys `cols` below `limit` send to a block of queries."""
    keep = kept(keep_ptr, cols, keep_ss, limit, PADDING)
    k = load_rows(k_ptr, cols, k_ss, k_sd, keep, D, D_PAD)
    v = load_rows(v_ptr, cols, v_ss, v_sd, keep, DV, DV_PAD)
    scores = dot(q, tl.trans(k), PRECISION)
    x = logits(
        scores, rows[:, None], cols[None, :], limit, keep[None, :],
        n_rows, upper, lower, sinks, prefix, bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
        scale, softcap, STRUCTURED, WINDOWED, PLAIN, CAPPED, BIAS, MASK, PADDING,
    )  # fmt: skip
    weights = recall(x, peak[:, None], tail[:, None], unit, PLAIN)
    dscores = weights * (dot(do, tl.trans(v), PRECISION) - delta[:, None])
    if CAPPED:
        dscores *= slope(scores, scale, softcap)
    return dq + dot(dscores.to(k.dtype), k, PRECISION)
