"""A token enters the ring in one launch: query and key are turned to their position, key and value take their slot."""

import torch
import triton
import triton.language as tl

from attnopt.kernels._triton import await_launch, can_overlap, next_power_of_two, offset, on_device_of
from attnopt.kernels.streaming.ring import Entry

TURN: tl.constexpr = tl.constexpr(6.283185307179586)


def launch(entry: Entry) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """near, far (B, H, D), newest (B,) and tickets of the decoding step; keys and values are written in place.

    fp32, bf16 or fp16; no dimension may be empty; frequencies in fp64, on the device.
    """
    q, k, v, span = entry.q, entry.k, entry.v, entry.span
    batch, heads, d = q.shape
    kv_heads, dv = v.shape[1:]
    rotates = entry.frequencies is not None
    far = torch.empty_like(q, memory_format=torch.contiguous_format) if rotates and span.sinks else q
    near = torch.empty_like(far) if rotates and not entry.turned else q
    newest = torch.empty_like(entry.seen)
    tickets = newest.new_empty(batch * kv_heads, dtype=torch.int32)
    pairs = entry.frequencies.shape[0] if entry.frequencies is not None else 0
    overlap = can_overlap(q)
    with on_device_of(q):
        enter_kernel[(batch * kv_heads,)](
            q, k, v, near, far, entry.keys, entry.values, entry.seen, newest, tickets,
            entry.seen if entry.keep is None else entry.keep.view(torch.uint8),
            q if entry.frequencies is None else entry.frequencies,
            *q.stride(), *k.stride(), *v.stride(), *near.stride(), *far.stride(),
            *entry.keys.stride(), *entry.values.stride(), 0 if entry.keep is None else entry.keep.stride(0),
            kv_heads, heads // kv_heads, d, dv, pairs, span.sinks, span.window, span.ring, entry.gain,
            TURNS_NEAR=rotates and not entry.turned, TURNS_FAR=rotates and span.sinks > 0,
            NEIGHBOURS=entry.neighbours, HAS_KEEP=entry.keep is not None,
            G_PAD=triton.next_power_of_2(heads // kv_heads), PAIRS_PAD=triton.next_power_of_2(max(1, pairs)),
            D_PAD=next_power_of_two(d), DV_PAD=next_power_of_two(dv), num_warps=2,
            OVERLAP=overlap, launch_pdl=overlap,
        )  # fmt: skip
    return near, far, newest, tickets


@triton.jit
def turn_rows(
    x_ptr, out_ptr, angle, row, exists, x_sh, x_sd, out_sh, out_sd, pairs, d, gain,
    NEIGHBOURS: tl.constexpr, PAIRS_PAD: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """out rows = x rows, of which the first 2 * pairs features turn by `angle` (PAIRS_PAD,), the others are copied."""
    c, e = tl.arange(0, PAIRS_PAD), tl.arange(0, D_PAD)
    step = 2 if NEIGHBOURS else 1
    first = c * step
    second = first + 1 if NEIGHBOURS else c + pairs
    here = exists[:, None] & (c < pairs)[None, :]
    x_row, out_row = x_ptr + offset(row, x_sh)[:, None], out_ptr + offset(row, out_sh)[:, None]
    a = tl.load(x_row + offset(first, x_sd)[None, :], mask=here, other=0.0).to(tl.float32)
    b = tl.load(x_row + offset(second, x_sd)[None, :], mask=here, other=0.0).to(tl.float32)
    rest = exists[:, None] & ((e >= 2 * pairs) & (e < d))[None, :]
    same = tl.load(x_row + offset(e, x_sd)[None, :], mask=rest, other=0.0)
    cos, sin = (tl.cos(angle) * gain)[None, :], (tl.sin(angle) * gain)[None, :]
    dtype = out_ptr.dtype.element_ty
    tl.store(out_row + offset(first, out_sd)[None, :], (a * cos - b * sin).to(dtype), mask=here)
    tl.store(out_row + offset(second, out_sd)[None, :], (b * cos + a * sin).to(dtype), mask=here)
    tl.store(out_row + offset(e, out_sd)[None, :], same.to(dtype), mask=rest)


@triton.jit
def angle_of(t, frequency):
    """t * frequency in fp32, with whole turns taken off in fp64, where they are still known."""
    turns = t.to(tl.float64) * frequency / TURN
    return ((turns - tl.floor(turns)) * TURN).to(tl.float32)


@triton.jit
def enter_kernel(
    q_ptr, k_ptr, v_ptr, near_ptr, far_ptr, keys_ptr, values_ptr, seen_ptr, newest_ptr, ticket_ptr, keep_ptr,
    frequency_ptr,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sd, v_sb, v_sh, v_sd, near_sb, near_sh, near_sd, far_sb, far_sh, far_sd,
    keys_sb, keys_sh, keys_ss, keys_sd, values_sb, values_sh, values_ss, values_sd, keep_sb,
    kv_heads, group, d, dv, pairs, sinks, window, ring, gain,
    TURNS_NEAR: tl.constexpr, TURNS_FAR: tl.constexpr, NEIGHBOURS: tl.constexpr, HAS_KEEP: tl.constexpr,
    G_PAD: tl.constexpr, PAIRS_PAD: tl.constexpr, D_PAD: tl.constexpr, DV_PAD: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (b, h): key and value of kv head h, and the queries of its group. `seen` is read, never written."""
    await_launch(OVERLAP)
    pid = tl.program_id(0)
    tl.store(ticket_ptr + pid, 0)
    b, h = pid // kv_heads, pid % kv_heads
    t = tl.load(seen_ptr + b)
    there = t >= 0
    if HAS_KEEP:
        there = tl.load(keep_ptr + offset(b, keep_sb)) != 0
    if h == 0:
        tl.store(newest_ptr + b, tl.where(there, t, -1))
    slot = tl.where(t < sinks, t, sinks + (t - sinks) % ring)

    g, e = tl.arange(0, G_PAD), tl.arange(0, DV_PAD)
    one = tl.arange(0, 1)
    key_ptr = keys_ptr + offset(b, keys_sb) + offset(h, keys_sh) + offset(slot, keys_ss)
    k_ptr += offset(b, k_sb) + offset(h, k_sh)
    first = q_ptr + offset(b, q_sb) + offset(h * group, q_sh)
    if TURNS_NEAR or TURNS_FAR:
        c = tl.arange(0, PAIRS_PAD)
        frequency = tl.load(frequency_ptr + c, mask=c < pairs, other=0.0)
        place = tl.minimum(t, sinks + window - 1)
    if TURNS_NEAR:
        angle = angle_of(t, frequency)
        near_ptr += offset(b, near_sb) + offset(h * group, near_sh)
        turn_rows(first, near_ptr, angle, g, g < group, q_sh, q_sd, near_sh, near_sd, pairs, d, gain,
                  NEIGHBOURS, PAIRS_PAD, D_PAD)  # fmt: skip
        turn_rows(k_ptr, key_ptr, angle, one, (one < 1) & there, k_sh, k_sd, keys_sh, keys_sd, pairs, d, gain,
                  NEIGHBOURS, PAIRS_PAD, D_PAD)  # fmt: skip
        if TURNS_FAR:
            far_ptr += offset(b, far_sb) + offset(h * group, far_sh)
            turn_rows(first, far_ptr, angle_of(place, frequency), g, g < group, q_sh, q_sd, far_sh, far_sd, pairs,
                      d, gain, NEIGHBOURS, PAIRS_PAD, D_PAD)  # fmt: skip
    else:
        f = tl.arange(0, D_PAD)
        key = tl.load(k_ptr + offset(f, k_sd), mask=f < d, other=0.0)
        tl.store(key_ptr + offset(f, keys_sd), key, mask=(f < d) & there)
        if TURNS_FAR:
            far_ptr += offset(b, far_sb) + offset(h * group, far_sh)
            turn_rows(first, far_ptr, angle_of(place - t, frequency), g, g < group, q_sh, q_sd, far_sh, far_sd,
                      pairs, d, 1.0, NEIGHBOURS, PAIRS_PAD, D_PAD)  # fmt: skip
    value = tl.load(v_ptr + offset(b, v_sb) + offset(h, v_sh) + offset(e, v_sd), mask=e < dv, other=0.0)
    value_ptr = values_ptr + offset(b, values_sb) + offset(h, values_sh) + offset(slot, values_ss)
    tl.store(value_ptr + offset(e, values_sd), value, mask=(e < dv) & there)
