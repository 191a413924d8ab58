"""Triton kernels for dq, one program per block of queries, and for what the backward knows of each row."""

import triton
import triton.language as tl

from attnopt.kernels._triton import dot, offset
from attnopt.kernels.streaming.triton_tiles import (
    LOG2E,
    NUMBERS,
    kept,
    load_rows,
    logits,
    recall,
    signed,
    slope,
    split,
    store_rows,
    tilt_of,
)


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


@triton.jit(do_not_specialize=NUMBERS)
def queries_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dq_ptr, delta_ptr, peak_ptr, tail_ptr, bias_ptr, mask_ptr, keep_ptr,
    slope_ptr, q_sb, q_sh, q_ss, q_sd, k_sb, k_sh, k_ss, k_sd, v_sb, v_sh, v_ss, v_sd, do_sb, do_sh, do_ss, do_sd,
    bias_sb, bias_sh, bias_sq, bias_sk, mask_sb, mask_sh, mask_sq, mask_sk, keep_sb, keep_ss,
    slope_sb, slope_sh, heads, group, n_rows, n_cols, upper, lower, sinks, prefix,
    unit, scale, softcap, diagonal, factor,
    SIGN: tl.constexpr, WINDOWED: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, PADDING: tl.constexpr, ALIBI: tl.constexpr, HEAD: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HEAD: tl.constexpr, PRECISION: tl.constexpr,
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
    tilt = tilt_of(slope_ptr, b, h, slope_sb, slope_sh, heads, ALIBI)

    dq = tl.zeros((BLOCK_Q, D_PAD), dtype=tl.float32)
    head = 0
    if HEAD:
        head = tl.maximum(prefix, tl.minimum(sinks, last + upper))
        for j in range(0, head, BLOCK_HEAD):
            dq = visit_queries(
                dq, q, do, rows, j + tl.arange(0, BLOCK_HEAD), head, delta, peak, tail,
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
        dq = visit_queries(
            dq, q, do, rows, start + n * BLOCK_K + tl.arange(0, BLOCK_K), n_cols, delta, peak, tail,
            k_ptr, k_ss, k_sd, v_ptr, v_ss, v_sd, keep_ptr, keep_ss,
            bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
            n_rows, upper, lower, sinks, prefix, unit, scale, softcap, tilt, first, diagonal,
            WINDOWED, PLAIN, CAPPED, BIAS, MASK, PADDING, ALIBI, D, D_PAD, DV, DV_PAD, PRECISION,
            structured=(n < before) | (n >= edge),
        )  # fmt: skip

    store_rows(dq_ptr + offset(bh, n_rows) * D, rows, D, dq * factor, exists, D, D_PAD)


@triton.jit
def visit_queries(
    dq, q, do, rows, cols, limit, delta, peak, tail,
    k_ptr, k_ss, k_sd, v_ptr, v_ss, v_sd, keep_ptr, keep_ss,
    bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
    n_rows, upper, lower, sinks, prefix, unit, scale, softcap, tilt, origin, diagonal,
    WINDOWED: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr, ALIBI: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, PRECISION: tl.constexpr,
    structured,
):  # fmt: skip
    """Adds what the keys `cols` below `limit` send to a block of queries."""
    keep = kept(keep_ptr, cols, keep_ss, limit, PADDING)
    k = load_rows(k_ptr, cols, k_ss, k_sd, keep, D, D_PAD)
    v = load_rows(v_ptr, cols, v_ss, v_sd, keep, DV, DV_PAD)
    scores = dot(q, tl.trans(k), PRECISION)
    x = logits(
        scores, rows[:, None], cols[None, :], limit, keep[None, :],
        n_rows, upper, lower, sinks, prefix, bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
        scale, softcap, tilt, origin, diagonal, structured, WINDOWED, PLAIN, CAPPED, BIAS, MASK, PADDING, ALIBI,
    )  # fmt: skip
    weights = recall(x, peak[:, None], tail[:, None], unit, PLAIN)
    dscores = weights * (dot(do, tl.trans(v), PRECISION) - delta[:, None])
    if CAPPED:
        dscores *= slope(scores, scale, softcap)
    return dq + dot(dscores.to(k.dtype), k, PRECISION)
