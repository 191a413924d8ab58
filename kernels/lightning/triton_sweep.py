"""One causal sweep of decayed linear attention in Triton; the forward and all three gradients are such sweeps.

    forward:  out_t = sum over s <= t of scale * exp(G_t - G_s) (x_t . y_s) z_s  +  what an initial state adds
    reverse:  the same with s >= t and exp(G_s - G_t)

Lightning Attention-2 (arXiv 2401.04658) in two levels: a program walks the chunks of one segment with the state in
fp32 registers. Many heads: one segment, one pass. Few heads: a first pass sums up each segment, a small scan turns the
sums into the states that enter the segments, and the second pass writes outputs.

Everything is held transposed, (Dv, rows): the state is then an accumulator that becomes the register operand of the
next product as it is, and of all products only the weights between the rows of a chunk travel through shared memory.
No accumulator is transposed to feed another product
(https://github.com/fla-org/flash-linear-attention/pull/826).
"""

import triton
import triton.language as tl

from attnopt.kernels._triton import offset
from attnopt.kernels.lightning.triton_decay import (
    decay_factor,
    forward_terms,
    head_decay,
    rest_of_factor,
    reverse_terms,
    running_decay,
    weighted_pairs,
)
from attnopt.kernels.lightning.triton_rows import address, load_rows, sequence_of, store_rows

#: Binary orders of magnitude between the largest sum that a state may hold and the least fp32 number.
_FADED = tl.constexpr(277.0)


@triton.jit
def _next_state(state, total, z, faded, PRECISION: tl.constexpr):
    """2^total x state + z^T faded."""
    factor = decay_factor(total, z.dtype)
    if z.dtype == tl.float32:
        # One rounding of the sum a chunk, and a factor near 1 with all its digits: errors add up over long sequences.
        added = tl.dot(tl.trans(z), faded, input_precision=PRECISION)
        state = state * factor + (state * rest_of_factor(total, factor) + added)
    else:
        state = tl.dot(tl.trans(z), faded, state * factor, input_precision=PRECISION)
    return state


@triton.jit
def _leave_state(
    leave_ptr, leave_sh, leave_sw, logs_ptr, bh, part, segment, first_segment, segments, state, decayed, dx, dz,
    in_state, DZ: tl.constexpr, REVERSE: tl.constexpr, OUTPUT: tl.constexpr,
):  # fmt: skip
    """After the second pass, of the last segment; after the first, where the next segment looks for what enters it."""
    at = leave_ptr + offset(bh, leave_sh) + offset(dx, DZ)[None, :] + dz[:, None]
    if OUTPUT:
        tl.store(at, state, mask=in_state & (segment == (0 if REVERSE else segments - 1)))
    else:
        after = segment - first_segment if REVERSE else segment + 1
        tl.store(at + offset(after, leave_sw), state, mask=in_state)
        tl.store(logs_ptr + bh * segments + after, decayed, mask=part == 0)


@triton.jit
def sweep_kernel(
    x_ptr, x_sb, x_sh, x_ss, x_sd,
    y_ptr, y_sb, y_sh, y_ss, y_sd,
    z_ptr, z_sb, z_sh, z_ss, z_sd,
    out_ptr, out_sb, out_sh, out_ss, out_sd,
    own_ptr, own_sb, own_sh, own_ss, own_sd, terms_ptr, terms_stride, states_ptr,
    starts_ptr, high_ptr, low_ptr, decay_stride,
    enter_ptr, enter_sh, enter_sw, enter_sx, enter_sz,
    leave_ptr, leave_sh, leave_sw, logs_ptr,
    scale, unit, H, S, x_share, y_share, z_share, own_share,
    chunks_each, segments, first_segment, launched, slices,
    DX: tl.constexpr, DZ: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Z: tl.constexpr, CHUNK: tl.constexpr,
    PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr, OUTPUT: tl.constexpr, BULK: tl.constexpr, OUT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, STATE_DTYPE: tl.constexpr, STATE_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one slice of the columns of z, one segment of one head; first and second pass alike.

    x, y, z, own and out: tensor descriptors of tiles (1, 1, CHUNK, columns) if BULK, else pointers with strides.
    `starts_ptr`: where packed sequences start, or None.

    With `own`, which is q in the sweep of dq and k in that of dk, the terms of d log_decay are left: see triton_decay.

    `unit`: what the state is divided by while a reverse sweep holds it, so that the scale, which belongs to its sum,
    need not be folded into half-precision operands, where small gradients would underflow: scale, or 1 if scale is 0.
    """
    # Slices of one segment are neighbours on the grid: they read the same rows while these are in L2.
    pid = tl.program_id(0)
    part = pid % slices
    segment = (pid // slices) % launched + first_segment
    bh = pid // (slices * launched)
    h = bh % H
    b, start, length, rows_before, chunks_before = sequence_of(starts_ptr, bh, H, S, slices, CHUNK)
    a = tl.arange(0, CHUNK)
    dx = tl.arange(0, BLOCK_X)
    dz = part * BLOCK_Z + tl.arange(0, BLOCK_Z)
    in_state = (dz < DZ)[:, None] & (dx < DX)[None, :]

    state = tl.zeros((BLOCK_Z, BLOCK_X), dtype=tl.float32)
    if OUTPUT and enter_ptr is not None:
        at_enter = address(
            enter_ptr, enter_sh, enter_sw, enter_sx, enter_sz, bh, segment, dx[None, :], dz[:, None]
        )
        state = tl.load(at_enter, mask=in_state, other=0.0)
        if REVERSE:
            state = state / unit
    decays_before = offset(bh if starts_ptr is None else h, decay_stride) + start
    g = head_decay(high_ptr, decay_stride, h, PER_TOKEN)
    decayed = 0.0

    first = segment * chunks_each
    count = tl.minimum(chunks_each, tl.cdiv(length, CHUNK) - first)
    begin = 0
    if not OUTPUT and high_ptr is not None and not PER_TOKEN:
        # What fades below the least fp32 number before its segment ends is not read.
        rows = 1.0 / tl.maximum(-g, 1e-6) * _FADED
        begin = tl.maximum(count - tl.ceil(rows / CHUNK).to(tl.int32), 0)
        decayed = g * begin * CHUNK
    end = start + length
    for i in range(begin, count):
        chunk = first + (count - 1 - i if REVERSE else i)
        row = chunk * CHUNK
        at = start + row
        y = load_rows(
            y_ptr, y_sb, y_sh, y_ss, y_sd, b, h // y_share, at, 0, end, DX, CHUNK, BLOCK_X, BULK
        )  # fmt: skip
        z = load_rows(
            z_ptr, z_sb, z_sh, z_ss, z_sd, b, h // z_share, at, part * BLOCK_Z, end, DZ, CHUNK, BLOCK_Z, BULK
        )

        # Log decay since the state entered the chunk, until it leaves, and over the whole chunk of m real rows.
        m = tl.minimum(length - row, CHUNK)
        high, low = running_decay(high_ptr, low_ptr, decays_before + row, a, PER_TOKEN)
        last_high, last_low = running_decay(high_ptr, low_ptr, decays_before + row, m - 1, PER_TOKEN)
        since = g * (a + 1) + (high + low)
        until = g * tl.maximum(m - 1 - a, 0) + ((last_high - high) + (last_low - low))
        total = g * m + (last_high + last_low)

        fade = decay_factor(since if REVERSE else until, y.dtype) * (scale / unit if REVERSE else 1.0)
        faded = (y.to(tl.float32) * fade[:, None]).to(y.dtype)
        if OUTPUT:
            x = load_rows(
                x_ptr, x_sb, x_sh, x_ss, x_sd, b, h // x_share, at, 0, end, DX, CHUNK, BLOCK_X, BULK
            )  # fmt: skip
            scores = tl.dot(y, tl.trans(x), input_precision=PRECISION)
            out = tl.dot(
                state.to(STATE_DTYPE), tl.trans(x).to(STATE_DTYPE), input_precision=STATE_PRECISION
            )  # fmt: skip
            reached = decay_factor(until if REVERSE else since, y.dtype) * (unit if REVERSE else scale)
            out *= reached[None, :]
            scores = weighted_pairs(scores, a, g, high, low, scale, PER_TOKEN, REVERSE, y.dtype)
            if own_ptr is not None:
                # out holds what passes between this chunk and those before it (in reverse: after it).
                own = load_rows(
                    own_ptr, own_sb, own_sh, own_ss, own_sd, b, h // own_share, at, part * BLOCK_Z, end, DZ,
                    CHUNK, BLOCK_Z, BULK,
                )  # fmt: skip
                passed = tl.sum(out * tl.trans(own).to(tl.float32), axis=0)
                at_state = states_ptr + (chunks_before + chunk) * (DX * DZ)
                at_state += dz[:, None] * DX + dx[None, :]
                if REVERSE:
                    entered = tl.load(at_state, mask=in_state, other=0.0).to(tl.float32)
                    through = tl.sum(entered * state) * unit * decay_factor(total, y.dtype)
                    terms = reverse_terms(passed, through, a)
                else:
                    tl.store(at_state, state.to(states_ptr.dtype.element_ty), mask=in_state)
                    terms = forward_terms(
                        passed, scores * tl.dot(z, tl.trans(own), input_precision=PRECISION), a
                    )  # fmt: skip
                tl.store(terms_ptr + offset(part, terms_stride) + rows_before + row + a, terms, mask=a < m)
            out = tl.dot(tl.trans(z), scores.to(z.dtype), out, input_precision=PRECISION)
            store_rows(
                out_ptr, out_sb, out_sh, out_ss, out_sd, b, h, at, part * BLOCK_Z, end, DZ,
                tl.trans(out.to(OUT_DTYPE)), CHUNK, BLOCK_Z, BULK,
            )  # fmt: skip

        state = _next_state(state, total, z, faded, PRECISION)
        decayed += total

    if leave_ptr is not None:
        _leave_state(
            leave_ptr, leave_sh, leave_sw, logs_ptr, bh, part, segment, first_segment, segments,
            state * unit if REVERSE else state, decayed, dx, dz, in_state, DZ, REVERSE, OUTPUT,
        )  # fmt: skip


@triton.jit
def carry_kernel(states_ptr, logs_ptr, segments, size, blocks, REVERSE: tl.constexpr, BLOCK: tl.constexpr):
    """Turns segment sums into entering states, in place: state[w] += 2^log[w] * state of the segment before."""
    pid = tl.program_id(0)
    bh = pid // blocks
    cells = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = cells < size
    here = states_ptr + offset(bh * segments, size) + cells
    log = logs_ptr + bh * segments
    stride = size
    one = 1
    if REVERSE:
        here += (segments - 1) * size
        log += segments - 1
        stride = -size
        one = -1
    state = tl.load(here, mask=inside, other=0.0)
    for _ in range(1, segments):
        here += stride
        log += one
        total = tl.load(log)
        factor = decay_factor(total, tl.float32)
        rest = state * rest_of_factor(total, factor)
        state = state * factor + (rest + tl.load(here, mask=inside, other=0.0))
        tl.store(here, state, mask=inside)
