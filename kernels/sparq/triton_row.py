"""Device code of SparQ's first launches: the new token into the cache, and the logits of a head that shares no key.

One head has a vector and not a matrix to multiply the channels by. So each thread carries neighbouring positions
through all channels, in fp32: nothing is exchanged between threads before the end of a tile.
"""

import triton
import triton.language as tl

from attnopt.kernels._triton import await_launch, offset
from attnopt.kernels.sparq.triton_select import first_local, range_of, rank_of, store_best


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


@triton.jit
def _row_logits(
    queries_ptr, index_ptr, heat_ptr, kt_ptr, kept_ptr, starts_ptr, lengths_ptr, local_ptr,
    logits_ptr, best_ptr, max_ptr, sum_ptr,
    kt_sb, kt_sh, kt_sd, kt_sn, kept_sb, kept_sn,
    kv_heads, rank, sk, runs, split, local, grown,
    ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Program (p, s): logits of head p in split s, the best of each run of them, and their part of the softmax."""
    await_launch(EARLY)
    pid, part = tl.program_id(0), tl.program_id(1)
    b, h = pid // kv_heads, pid % kv_heads
    first, last = range_of(starts_ptr, lengths_ptr, b, sk, grown)
    is_local_from = first_local(local_ptr, b, last, local)
    heat = tl.load(heat_ptr + pid)
    kt_head = kt_ptr + offset(b, kt_sb) + offset(h, kt_sh)

    # Each lane keeps its own maximum and sum; they meet once, at the end.
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    begin = tl.maximum(part * split, first // BLOCK * BLOCK)
    for start in range(begin, tl.minimum((part + 1) * split, last), BLOCK):
        pos = start + tl.arange(0, BLOCK)
        inside = pos < sk
        s = tl.zeros((BLOCK,), tl.float32)
        for row in tl.range(0, rank, ROWS, num_stages=STAGES):
            r = row + tl.arange(0, ROWS)
            channel = tl.load(index_ptr + offset(pid, rank) + r, mask=r < rank, other=0)
            q = tl.load(queries_ptr + offset(pid, rank) + r, mask=r < rank, other=0.0).to(tl.float32)
            # All rows are under way before the first is needed; they are read once.
            k = tl.load(
                kt_head + offset(channel, kt_sd)[:, None] + offset(pos, kt_sn)[None, :],
                mask=(r < rank)[:, None] & inside[None, :], other=0.0, eviction_policy="evict_first",
            )  # fmt: skip
            s += tl.sum(q[:, None] * k.to(tl.float32), axis=0)
        s *= heat
        seen = (pos >= first) & (pos < last)
        if kept_ptr is not None:
            seen &= tl.load(kept_ptr + offset(b, kept_sb) + offset(pos, kept_sn), mask=inside, other=0) != 0
        s = tl.where(seen, s, float("-inf"))
        tl.store(logits_ptr + offset(pid, sk) + pos, s, mask=inside)
        store_best(best_ptr, rank_of(s, pos >= is_local_from), pid, runs, start, BLOCK, RUN)
        new = tl.maximum(top, s)
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - base) + tl.exp2(s - base)
        top = new

    whole = tl.max(top, axis=0)
    base = tl.where(whole == float("-inf"), 0.0, whole)
    at = offset(pid, tl.num_programs(1)) + part
    tl.store(max_ptr + at, whole)
    tl.store(sum_ptr + at, tl.sum(total * tl.exp2(top - base), axis=0))
