"""Triton kernels for dk and dv: one program per block of keys, over the queries that see it.

Tiles are transposed, (keys, queries), and their operands loaded for that: a transposed accumulator never feeds a
product (fla issue 640: wrong gradients on Hopper). Sink columns are seen by every query: the rows beyond their
window are summed in parts by programs of their own, whose tile is as narrow as the sinks.
"""

import triton
import triton.language as tl

from attnopt.kernels._triton import dot, offset
from attnopt.kernels.streaming.triton_tiles import (
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


@triton.jit(do_not_specialize=NUMBERS)
def keys_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, far_dk_ptr, far_dv_ptr, delta_ptr, peak_ptr, tail_ptr,
    bias_ptr, mask_ptr, keep_ptr, slope_ptr,
    q_sb, q_sh, q_ss, q_sd, k_sb, k_sh, k_ss, k_sd, v_sb, v_sh, v_ss, v_sd, do_sb, do_sh, do_ss, do_sd,
    bias_sb, bias_sh, bias_sq, bias_sk, mask_sb, mask_sh, mask_sq, mask_sk, keep_sb, keep_ss,
    slope_sb, slope_sh, heads, group, n_rows, n_cols, upper, lower, sinks, prefix, parts,
    unit, scale, softcap, diagonal, factor,
    SIGN: tl.constexpr, WINDOWED: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, PADDING: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
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
        for part in range(parts):
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
    for g in range(group):
        h = kv_head * group + g
        at = offset(b * heads + h, n_rows)
        tilt = tilt_of(slope_ptr, b, h, slope_sb, slope_sh, heads, ALIBI)
        edge = before + (partial - full) // BLOCK_Q
        for n in range(edge + after):
            i = start + n * BLOCK_Q
            dk, dv = visit_keys(
                dk, dv, k, v, i + tl.arange(0, BLOCK_Q), cols, keep, n_cols,
                q_ptr + offset(b, q_sb) + offset(h, q_sh), q_ss, q_sd,
                do_ptr + offset(b, do_sb) + offset(h, do_sh), do_ss, do_sd,
                delta_ptr + at, peak_ptr + at, tail_ptr + at,
                bias_ptr + offset(b, bias_sb) + offset(h, bias_sh), bias_sq, bias_sk,
                mask_ptr + offset(b, mask_sb) + offset(h, mask_sh), mask_sq, mask_sk,
                stop, upper, lower, sinks, prefix, unit, scale, softcap, tilt, i, diagonal,
                WINDOWED, SIGN, PLAIN, CAPPED, BIAS, MASK, PADDING, ALIBI, D, D_PAD, DV, DV_PAD, PRECISION,
                structured=(n < before) | (n >= edge),
            )  # fmt: skip

    done = offset(bh, n_cols)
    exists = cols < n_cols
    store_rows(dk_ptr + done * D, cols, D, dk * factor, exists, D, D_PAD)
    store_rows(dv_ptr + done * DV, cols, DV, dv, exists, DV, DV_PAD)


@triton.jit(do_not_specialize=NUMBERS)
def far_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dk_ptr, dv_ptr, delta_ptr, peak_ptr, tail_ptr, bias_ptr, mask_ptr, keep_ptr,
    slope_ptr, q_sb, q_sh, q_ss, q_sd, k_sb, k_sh, k_ss, k_sd, v_sb, v_sh, v_ss, v_sd, do_sb, do_sh, do_ss, do_sd,
    bias_sb, bias_sh, bias_sq, bias_sk, mask_sb, mask_sh, mask_sq, mask_sk, keep_sb, keep_ss,
    slope_sb, slope_sh, heads, group, n_rows, n_cols, upper, lower, sinks, prefix, parts,
    unit, scale, softcap, diagonal,
    SIGN: tl.constexpr, WINDOWED: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr, BIAS: tl.constexpr,
    MASK: tl.constexpr, PADDING: tl.constexpr, ALIBI: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    DV: tl.constexpr, DV_PAD: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_SINK: tl.constexpr,
    PRECISION: tl.constexpr,
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
    for g in range(group):
        h = kv_head * group + g
        at = offset(b * heads + h, n_rows)
        tilt = tilt_of(slope_ptr, b, h, slope_sb, slope_sh, heads, ALIBI)
        for i in range(start, stop, BLOCK_Q):
            dk, dv = visit_keys(
                dk, dv, k, v, i + tl.arange(0, BLOCK_Q), cols, keep, sinks,
                q_ptr + offset(b, q_sb) + offset(h, q_sh), q_ss, q_sd,
                do_ptr + offset(b, do_sb) + offset(h, do_sh), do_ss, do_sd,
                delta_ptr + at, peak_ptr + at, tail_ptr + at,
                bias_ptr + offset(b, bias_sb) + offset(h, bias_sh), bias_sq, bias_sk,
                mask_ptr + offset(b, mask_sb) + offset(h, mask_sh), mask_sq, mask_sk,
                stop, upper, lower, sinks, prefix, unit, scale, softcap, tilt, i, diagonal,
                WINDOWED, SIGN, PLAIN, CAPPED, BIAS, MASK, PADDING, ALIBI, D, D_PAD, DV, DV_PAD, PRECISION,
                structured=True,
            )  # fmt: skip

    exists = cols < sinks
    done = offset(piece, sinks)
    store_rows(dk_ptr + done * D, cols, D, dk, exists, D, D_PAD)
    store_rows(dv_ptr + done * DV, cols, DV, dv, exists, DV, DV_PAD)


@triton.jit
def visit_keys(
    dk, dv, k, v, rows, cols, keep, limit, q_ptr, q_ss, q_sd, do_ptr, do_ss, do_sd, delta_ptr, peak_ptr, tail_ptr,
    bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
    stop, upper, lower, sinks, prefix, unit, scale, softcap, tilt, origin, diagonal,
    WINDOWED: tl.constexpr, SIGN: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr, ALIBI: tl.constexpr,
    D: tl.constexpr, D_PAD: tl.constexpr, DV: tl.constexpr, DV_PAD: tl.constexpr, PRECISION: tl.constexpr,
    structured,
):  # fmt: skip
    """Adds what the queries `rows` before `stop` send to a block of keys; the tile is transposed, (keys, queries)."""
    exists = rows < stop
    q = signed(load_rows(q_ptr, rows, q_ss, q_sd, exists, D, D_PAD), SIGN)
    scores = dot(k, tl.trans(q), PRECISION)
    x = logits(
        scores, rows[None, :], cols[:, None], limit, keep[:, None],
        stop, upper, lower, sinks, prefix, bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
        scale, softcap, tilt, origin, diagonal, structured, WINDOWED, PLAIN, CAPPED, BIAS, MASK, PADDING, ALIBI,
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
