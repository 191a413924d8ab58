"""The forward for Hopper: FlashAttention-3 (arXiv 2407.08608, algorithm 2) with the tiles that nobody sees left out.

While a warp group's product of weights and values runs, it takes the exponentials of the next tile. Programs stay and
take one piece of work after another, so that the loads of the next overlap the end of the last.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnopt.kernels.streaming.triton_hopper_parts import (
    NARROW,
    NUMBERS,
    ROWS,
    fetch,
    hide,
    hide_in_tile,
    keys_of,
    make_ring,
    place_queries,
    produce_keys,
    tile_of_keys,
    turns_of,
    work_of,
)

_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit(do_not_specialize=NUMBERS)
def attend_kernel(
    q_desc, k_desc, v_desc, narrow_k_desc, narrow_v_desc, o_desc, lse_ptr, log_sum_ptr,
    works, blocks, light, heads, group, n_rows, n_cols, upper, lower, sinks, prefix, unit, scale,
    STAGES: gl.constexpr, SETS: gl.constexpr, WINDOWED: gl.constexpr, HEAD: gl.constexpr,
    EMPTY_IS_ZERO: gl.constexpr,
):  # fmt: skip
    """o, lse, log_sum. HEAD: "none", "narrow" (a tile of 16 columns) or "tiles".

    SETS of queries are on chip: with two, the next piece of work's arrive during this one.
    """
    dtype: gl.constexpr = q_desc.dtype
    queries = make_ring(dtype, q_desc, 2 * SETS, 1)
    keys = make_ring(dtype, k_desc, STAGES, 2)
    values = make_ring(dtype, v_desc, STAGES, 2)
    narrow_keys = make_ring(dtype, narrow_k_desc, 1, 2)
    narrow_values = make_ring(dtype, narrow_v_desc, 1, 2)
    fence_async_shared()
    edges = (n_rows, n_cols, upper, lower, sinks, prefix)
    rings = (queries, keys, values, narrow_keys, narrow_values)
    share = (works, blocks, light, heads, group)
    block: gl.constexpr = k_desc.block_shape[2]
    results = (o_desc, lse_ptr, log_sum_ptr)
    descs = (q_desc, k_desc, v_desc, narrow_k_desc, narrow_v_desc)
    first_half: gl.constexpr = 0
    second_half: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_compute, (first_half, results, rings, share, edges, unit, scale, block, WINDOWED, HEAD, EMPTY_IS_ZERO)),
            (_compute, (second_half, results, rings, share, edges, unit, scale, block, WINDOWED, HEAD, EMPTY_IS_ZERO)),
            (_load, (descs, rings, share, edges, block, WINDOWED, HEAD)),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _load(descs, rings, share, edges, BLOCK: gl.constexpr, WINDOWED: gl.constexpr, HEAD: gl.constexpr):
    """The loading warp group."""
    q_desc, k_desc, v_desc, narrow_k_desc, narrow_v_desc = descs
    queries, keys, values, narrow_keys, narrow_values = rings
    works, blocks, light, heads, group = share
    sets: gl.constexpr = queries[0].shape[0] // 2
    n = 0
    for turn in range(0, turns_of(works)):
        b, h, first = place_queries(work_of(turn), works, blocks, light, heads)
        for half in gl.static_range(2):
            fetch(q_desc, b, h, first + half * ROWS, queries, turn % sets * 2 + half, turn // sets & 1)
        n = produce_keys(
            k_desc, v_desc, narrow_k_desc, narrow_v_desc, keys, values, narrow_keys, narrow_values,
            b, h // group, first, turn, n, edges, BLOCK, WINDOWED, HEAD,
        )  # fmt: skip


@gluon.jit
def _compute(
    half: gl.constexpr, results, rings, share, edges, unit, scale,
    BLOCK: gl.constexpr, WINDOWED: gl.constexpr, HEAD: gl.constexpr, EMPTY_IS_ZERO: gl.constexpr,
):  # fmt: skip
    """A computing warp group: one half of the queries of each piece of work."""
    o_desc, lse_ptr, log_sum_ptr = results
    queries, keys, values, narrow_keys, narrow_values = rings
    works, blocks, light, heads, group = share
    n_rows = edges[0]
    WIDTH: gl.constexpr = o_desc.block_shape[3]
    dtype: gl.constexpr = o_desc.dtype
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    stages: gl.constexpr = keys[0].shape[0]
    sets: gl.constexpr = queries[0].shape[0] // 2
    n = 0
    for turn in range(0, turns_of(works)):
        b, h, first = place_queries(work_of(turn), works, blocks, light, heads)
        head, more, start, count = keys_of(first, edges, BLOCK, WINDOWED, HEAD)
        mine = first + half * ROWS
        rows = mine + gl.arange(0, ROWS, BY_ROW)
        level = gl.full([ROWS], float("-inf"), gl.float32, BY_ROW)
        total = gl.zeros([ROWS], gl.float32, BY_ROW)
        acc = gl.zeros([ROWS, WIDTH], gl.float32, OUT)
        place = turn % sets * 2 + half
        q = queries[0].index(place).reshape([ROWS, WIDTH])
        mbarrier.wait(queries[1].index(place), turn // sets & 1)
        if count > 0:
            column, limit, partial = tile_of_keys(0, mine, head, more, start, edges, BLOCK, WINDOWED)
            mbarrier.wait(keys[1].index(n % stages), n // stages & 1)
            k = keys[0].index(n % stages).reshape([BLOCK, WIDTH]).permute((1, 0))
            x_running = warpgroup_mma(
                q, k, gl.zeros([ROWS, BLOCK], gl.float32, LOGITS), use_acc=False, is_async=True
            )
            if HEAD == "narrow":
                y = _multiply_narrow(q, rows, head, narrow_keys, turn & 1, edges, WINDOWED)
                level = gl.convert_layout(gl.max(y, 1), BY_ROW)
            x = warpgroup_mma_wait(0, deps=[x_running])
            mbarrier.arrive(keys[2].index(n % stages), count=1)
            if partial:
                x = hide_in_tile(x, rows, column, limit, edges, WINDOWED, HEAD)
            weights, fade, level, total = _soften(x, level, total, unit)
            if HEAD == "narrow":
                acc, total = _add_narrow(acc, total, y, level, narrow_values, turn & 1, unit, WEIGHTS, dtype)
            p = gl.convert_layout(weights.to(dtype), WEIGHTS)
            for t in range(1, count):
                column, limit, partial = tile_of_keys(t, mine, head, more, start, edges, BLOCK, WINDOWED)
                now, before = (n + t) % stages, (n + t - 1) % stages
                mbarrier.wait(keys[1].index(now), (n + t) // stages & 1)
                k = keys[0].index(now).reshape([BLOCK, WIDTH]).permute((1, 0))
                x_running = warpgroup_mma(
                    q, k, gl.zeros([ROWS, BLOCK], gl.float32, LOGITS), use_acc=False, is_async=True
                )
                mbarrier.wait(values[1].index(before), (n + t - 1) // stages & 1)
                v = values[0].index(before).reshape([BLOCK, WIDTH])
                acc_running = warpgroup_mma(p, v, acc, is_async=True)
                x = warpgroup_mma_wait(1, deps=[x_running])
                mbarrier.arrive(keys[2].index(now), count=1)
                if partial:
                    x = hide_in_tile(x, rows, column, limit, edges, WINDOWED, HEAD)
                weights, fade, level, total = _soften(x, level, total, unit)
                acc, _ = warpgroup_mma_wait(0, deps=[acc_running, p])
                mbarrier.arrive(values[2].index(before), count=1)
                acc = acc * gl.expand_dims(gl.convert_layout(fade, gl.SliceLayout(1, OUT)), 1)
                p = gl.convert_layout(weights.to(dtype), WEIGHTS)
            n += count
            before = (n - 1) % stages
            mbarrier.wait(values[1].index(before), (n - 1) // stages & 1)
            acc = warpgroup_mma(p, values[0].index(before).reshape([BLOCK, WIDTH]), acc)
            mbarrier.arrive(values[2].index(before), count=1)
        elif HEAD == "narrow":
            y = _multiply_narrow(q, rows, head, narrow_keys, turn & 1, edges, WINDOWED)
            level = gl.convert_layout(gl.max(y, 1), BY_ROW)
            acc, total = _add_narrow(acc, total, y, level, narrow_values, turn & 1, unit, WEIGHTS, dtype)

        # A NaN in the row leaves its mark in `total` but not in `level`: such a row is not empty.
        empty = (level == float("-inf")) & (total == 0.0)
        total = gl.where(empty, 1.0, total)
        share_of = gl.where(empty, 0.0 if EMPTY_IS_ZERO else float("nan"), 1.0 / total)
        q.store((acc * gl.expand_dims(gl.convert_layout(share_of, gl.SliceLayout(1, OUT)), 1)).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(o_desc, [b, h, mine, 0], queries[0].index(place))
        log_sum = gl.log2(total) * _LN2
        at = (b * heads + h).to(gl.int64) * n_rows + rows
        gl.store(lse_ptr + at, level * scale + log_sum, mask=rows < n_rows)
        gl.store(log_sum_ptr + at, log_sum, mask=rows < n_rows)
        tma.store_wait(pendings=0)
        mbarrier.arrive(queries[2].index(place), count=1)


@gluon.jit
def _multiply_narrow(q, rows, head, narrow_keys, phase, edges, WINDOWED: gl.constexpr):
    """The logits of the head's narrow tile."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW, 16])
    mbarrier.wait(narrow_keys[1].index(0), phase)
    k = narrow_keys[0].index(0).reshape([NARROW, q.shape[1]]).permute((1, 0))
    y = warpgroup_mma(q, k, gl.zeros([ROWS, NARROW], gl.float32, LOGITS), use_acc=False)
    mbarrier.arrive(narrow_keys[2].index(0), count=1)
    return hide(y, gl.convert_layout(rows, gl.SliceLayout(1, LOGITS)), 0, head, edges, WINDOWED)


@gluon.jit
def _add_narrow(
    acc, total, y, level, narrow_values, phase, unit, WEIGHTS: gl.constexpr, dtype: gl.constexpr
):  # fmt: skip
    """Takes the narrow tile's logits y into accumulator and sum, which begin with it; `level` is largest of more."""
    BY_ROW: gl.constexpr = gl.SliceLayout(1, y.type.layout)
    weights = gl.exp2(y * unit - gl.expand_dims(gl.convert_layout(_base(level, unit), BY_ROW), 1))
    mbarrier.wait(narrow_values[1].index(0), phase)
    v = narrow_values[0].index(0).reshape([NARROW, acc.shape[1]])
    acc = warpgroup_mma(gl.convert_layout(weights.to(dtype), WEIGHTS), v, acc)
    mbarrier.arrive(narrow_values[2].index(0), count=1)
    return acc, total + gl.convert_layout(gl.sum(weights, 1), total.type.layout)


@gluon.jit
def _soften(x, level, total, unit):
    """(weights, fade, level, total): the weights of the logits x, and what the sums so far are multiplied by."""
    highest = gl.maximum(level, gl.max(x, 1))
    base = _base(highest, unit)
    weights = gl.exp2(x * unit - gl.expand_dims(base, 1))
    fade = gl.exp2(level * unit - base)
    return weights, fade, highest, total * fade + gl.sum(weights, 1)


@gluon.jit
def _base(level, unit):
    """What exponents are counted from; a number also where all is hidden."""
    return gl.where(level == float("-inf"), 0.0, level) * unit
