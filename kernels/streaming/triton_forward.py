"""Triton forward: one program per block of queries, over the head columns, the partial tiles, then the full tiles.

FlashAttention-2 (arXiv 2307.08691, algorithm 1) with the tiles that nobody sees left out. Full tiles do no
masking. Exponentials are exp2; statistics and accumulator are fp32.
"""

import torch
import triton
import triton.language as tl

from attnopt.kernels._triton import dot, next_power_of_two, offset, on_device_of
from attnopt.kernels.streaming.problem import Answer, Problem, fill_empty_rows
from attnopt.kernels.streaming.triton_tiles import (
    BY_QUERIES,
    LN2,
    NUMBERS,
    Tiles,
    kept,
    load_rows,
    logits,
    padded,
    raise_to,
    scalars,
    signed,
    split,
    store_rows,
    strides,
    tiles_for,
    tilt_of,
)


def launch(problem: Problem, tiles: Tiles | None = None) -> Answer:
    """The attention of `problem`, on the device of q; no dimension may be empty. `tiles` overrides the choice."""
    q, k, v = problem.q, problem.k, problem.v
    batch, heads, rows, d = q.shape
    dv = v.shape[3]
    tiles = tiles or tiles_for(problem, BY_QUERIES)
    o = q.new_empty((batch, heads, rows, dv))
    lse, log_sum = (q.new_empty((batch, heads, rows), dtype=torch.float32) for _ in range(2))
    head = problem.reach.head
    with on_device_of(q):
        attend_kernel[(batch * heads * triton.cdiv(rows, tiles.queries),)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            o_ptr=o,
            lse_ptr=lse,
            log_sum_ptr=log_sum,
            sink_ptr=q if problem.sink_logits is None else problem.sink_logits.contiguous(),
            **(strides("q", q) | strides("k", k) | strides("v", v) | scalars(problem)),
            heads=heads,
            group=problem.group,
            SINKS=problem.sink_logits is not None,
            HEAD=head > 0,
            EMPTY_IS_ZERO=problem.empty_row == "zero",
            D=d,
            D_PAD=padded(d),
            DV=dv,
            DV_PAD=padded(dv),
            BLOCK_Q=tiles.queries,
            BLOCK_K=tiles.keys,
            BLOCK_HEAD=min(tiles.keys, next_power_of_two(head)),
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return Answer(fill_empty_rows(problem, o, lse) if problem.returns_the_mean else o, lse, log_sum)


@triton.jit(do_not_specialize=NUMBERS)
def attend_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, log_sum_ptr, bias_ptr, mask_ptr, keep_ptr, sink_ptr,
    slope_ptr,
    q_sb, q_sh, q_ss, q_sd, k_sb, k_sh, k_ss, k_sd, v_sb, v_sh, v_ss, v_sd,
    bias_sb, bias_sh, bias_sq, bias_sk, mask_sb, mask_sh, mask_sq, mask_sk, keep_sb, keep_ss,
    slope_sb, slope_sh, heads, group, n_rows, n_cols, upper, lower, sinks, prefix, unit, scale, softcap, diagonal,
    SIGN: tl.constexpr, WINDOWED: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, PADDING: tl.constexpr, ALIBI: tl.constexpr, SINKS: tl.constexpr, HEAD: tl.constexpr,
    EMPTY_IS_ZERO: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o, lse, log_sum of BLOCK_Q queries of one head. Later blocks, which see more keys, come first."""
    blocks = tl.cdiv(n_rows, BLOCK_Q)
    bh = tl.program_id(0) // blocks
    first = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, n_rows)
    b, h = bh // heads, bh % heads

    rows = first + tl.arange(0, BLOCK_Q)
    exists = rows < n_rows
    q = load_rows(q_ptr + offset(b, q_sb) + offset(h, q_sh), rows, q_ss, q_sd, exists, D, D_PAD)
    q = signed(q, SIGN)
    k_ptr += offset(b, k_sb) + offset(h // group, k_sh)
    v_ptr += offset(b, v_sb) + offset(h // group, v_sh)
    bias_ptr += offset(b, bias_sb) + offset(h, bias_sh)
    mask_ptr += offset(b, mask_sb) + offset(h, mask_sh)
    keep_ptr += offset(b, keep_sb)
    tilt = tilt_of(slope_ptr, b, h, slope_sb, slope_sh, heads, ALIBI)

    acc = tl.zeros((BLOCK_Q, DV_PAD), dtype=tl.float32)
    level = tl.full((BLOCK_Q,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    if SINKS:
        level = tl.zeros_like(total) + tl.load(sink_ptr + h, mask=h < heads, other=0.0).to(tl.float32)
        total = tl.where(level == -float("inf"), 0.0, 1.0)
    head = 0
    if HEAD:
        head = tl.maximum(prefix, tl.minimum(sinks, last + upper))
        for j in range(0, head, BLOCK_HEAD):
            acc, level, total = visit(
                acc, level, total, q, rows, j + tl.arange(0, BLOCK_HEAD), head,
                k_ptr, k_ss, k_sd, v_ptr, v_ss, v_sd, keep_ptr, keep_ss,
                bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
                n_rows, upper, lower, sinks, prefix, unit, scale, softcap, tilt, first, diagonal,
                WINDOWED, PLAIN, CAPPED, BIAS, MASK, PADDING, ALIBI, D, D_PAD, DV, DV_PAD, PRECISION,
                structured=True,
            )  # fmt: skip

    start = tl.maximum(first + lower + 1, head) if WINDOWED else head
    full_start = last + lower if WINDOWED else start
    before, full, partial, after = split(
        start, tl.minimum(last + upper, n_cols), full_start, tl.minimum(first + upper + 1, n_cols), BLOCK_K
    )
    edge = before + (partial - full) // BLOCK_K
    for n in range(edge + after):
        acc, level, total = visit(
            acc, level, total, q, rows, start + n * BLOCK_K + tl.arange(0, BLOCK_K), n_cols,
            k_ptr, k_ss, k_sd, v_ptr, v_ss, v_sd, keep_ptr, keep_ss,
            bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
            n_rows, upper, lower, sinks, prefix, unit, scale, softcap, tilt, first, diagonal,
            WINDOWED, PLAIN, CAPPED, BIAS, MASK, PADDING, ALIBI, D, D_PAD, DV, DV_PAD, PRECISION,
            structured=(n < before) | (n >= edge),
        )  # fmt: skip

    # A NaN in the row leaves its mark in `total` but not in `level`: such a row is not empty.
    empty = (level == -float("inf")) & (total == 0.0)
    total = tl.where(empty, 1.0, total)
    o = tl.where(empty[:, None], 0.0 if EMPTY_IS_ZERO else float("nan"), acc / total[:, None])
    log_sum = tl.log2(total) * LN2
    rows_done = offset(bh, n_rows)
    store_rows(o_ptr + rows_done * DV, rows, DV, o, exists, DV, DV_PAD)
    if PLAIN:
        level *= scale
    tl.store(lse_ptr + rows_done + rows, level + log_sum, mask=exists)
    tl.store(log_sum_ptr + rows_done + rows, log_sum, mask=exists)


@triton.jit
def visit(
    acc, level, total, q, rows, cols, limit,
    k_ptr, k_ss, k_sd, v_ptr, v_ss, v_sd, keep_ptr, keep_ss,
    bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
    n_rows, upper, lower, sinks, prefix, unit, scale, softcap, tilt, origin, diagonal,
    WINDOWED: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr, ALIBI: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, PRECISION: tl.constexpr,
    structured,
):  # fmt: skip
    """Takes the keys `cols` below `limit` into accumulator, largest logit and sum of one block of queries."""
    keep = kept(keep_ptr, cols, keep_ss, limit, PADDING)
    k = load_rows(k_ptr, cols, k_ss, k_sd, keep, D, D_PAD)
    x = logits(
        dot(q, tl.trans(k), PRECISION), rows[:, None], cols[None, :], limit, keep[None, :],
        n_rows, upper, lower, sinks, prefix, bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
        scale, softcap, tilt, origin, diagonal, structured, WINDOWED, PLAIN, CAPPED, BIAS, MASK, PADDING, ALIBI,
    )  # fmt: skip
    highest = tl.maximum(level, tl.max(x, 1))
    base = tl.where(highest == -float("inf"), 0.0, highest)
    weights = raise_to(x, base[:, None], unit, PLAIN)
    fade = tl.exp2((level - base) * unit)
    v = load_rows(v_ptr, cols, v_ss, v_sd, keep, DV, DV_PAD)
    acc = acc * fade[:, None] + dot(weights.to(v.dtype), v, PRECISION)
    return acc, highest, total * fade + tl.sum(weights, 1)
