"""Device code of SparQ's logits for a head that shares no key.

One head has a vector and not a matrix to multiply the channels by. So each thread carries neighbouring positions
through all channels, in fp32: nothing is exchanged between threads before the end of a tile.
"""

import triton
import triton.language as tl

from attnopt.kernels._triton import await_launch, offset
from attnopt.kernels.sparq.triton_select import first_local, range_of, rank_of, store_best
from attnopt.kernels.sparq.triton_start import start_group


@triton.jit
def _row_logits(
    index_ptr, queries_ptr, heat_ptr,
    q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, akt_ptr, mean_ptr,
    q_sb, q_sh, q_sd, scale, nk_sb, nk_sh, nk_sd, nv_sb, nv_sh, nv_sd,
    k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, akt_sb, akt_sh, akt_sd, akt_sn, mean_sb, mean_sh, mean_sd, d, dv,
    kt_ptr, kept_ptr, starts_ptr, lengths_ptr, local_ptr, logits_ptr, best_ptr, max_ptr, sum_ptr,
    kt_sb, kt_sh, kt_sd, kt_sn, kept_sb, kept_sn,
    kv_heads, rank, sk, runs, split, local, grown,
    ROWS: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr, RUN: tl.constexpr,
    HEADS: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr, OWN: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program (p, s): logits of head p in split s, the best of each run of them, and their part of the softmax."""
    await_launch(EARLY)
    pid, part = tl.program_id(0), tl.program_id(1)
    b, h = pid // kv_heads, pid % kv_heads
    mine = pid
    if OWN:
        start_group(
            index_ptr, queries_ptr, heat_ptr,
            q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, akt_ptr, mean_ptr,
            q_sb, q_sh, q_sd, scale, nk_sb, nk_sh, nk_sd, nv_sb, nv_sh, nv_sd,
            k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, akt_sb, akt_sh, akt_sd, akt_sn, mean_sb, mean_sh, mean_sd,
            d, dv, starts_ptr, lengths_ptr, kv_heads, 1, sk, rank, pid, part, tl.num_programs(1), split,
            HEADS, D_PAD, DV_PAD,
        )  # fmt: skip
        mine = pid * tl.num_programs(1) + part
        tl.debug_barrier()  # what other threads of this program stored is read next
    first, last = range_of(starts_ptr, lengths_ptr, b, sk, grown)
    is_local_from = first_local(local_ptr, b, last, local)
    heat = tl.load(heat_ptr + mine)
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
            channel = tl.load(index_ptr + offset(mine, rank) + r, mask=r < rank, other=0)
            q = tl.load(queries_ptr + offset(mine, rank) + r, mask=r < rank, other=0.0).to(tl.float32)
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
