"""dq for Hopper: FlashAttention-3's backward (arXiv 2407.08608) for one block of queries, over the forward's tiles."""

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

_LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit(do_not_specialize=NUMBERS)
def queries_kernel(
    q_desc, do_desc, k_desc, v_desc, narrow_k_desc, narrow_v_desc, dq_desc, delta_ptr, tail_ptr,
    o_ptr, lse_ptr, near_dk_ptr, near_dv_ptr,
    works, blocks, light, heads, group, n_rows, n_cols, upper, lower, sinks, prefix, unit, factor,
    STAGES: gl.constexpr, SETS: gl.constexpr, WINDOWED: gl.constexpr, HEAD: gl.constexpr, SUMS: gl.constexpr,
    ROWS_KNOWN: gl.constexpr,
):  # fmt: skip
    """dq. HEAD: "none", "narrow" (a tile of 16 columns) or "tiles"; SETS as in the forward.

    delta and tail (B, H, Sq) fp32; unless ROWS_KNOWN they are made here, from o (B, H, Sq, D) and lse, all contiguous.
    near_dk, near_dv (works, 2, head, .) fp32, with SUMS: what each 64 queries send to the keys of a narrow tile.
    """
    dtype: gl.constexpr = q_desc.dtype
    queries = make_ring(dtype, q_desc, 2 * SETS, 1)
    upstream = make_ring(dtype, do_desc, 2 * SETS, 1)
    keys = make_ring(dtype, k_desc, STAGES, 2)
    values = make_ring(dtype, v_desc, STAGES, 2)
    narrow_keys = make_ring(dtype, narrow_k_desc, 1, 2)
    narrow_values = make_ring(dtype, narrow_v_desc, 1, 2)
    near: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    notes = gl.allocate_shared_memory(dtype, [4, ROWS, NARROW], near)
    fence_async_shared()
    edges = (n_rows, n_cols, upper, lower, sinks, prefix)
    rings = (queries, upstream, keys, values, narrow_keys, narrow_values)
    results = (dq_desc, notes, near_dk_ptr, near_dv_ptr)
    share = (works, blocks, light, heads, group)
    block: gl.constexpr = k_desc.block_shape[2]
    rows = (delta_ptr, tail_ptr, o_ptr, lse_ptr)
    descs = (q_desc, do_desc, k_desc, v_desc, narrow_k_desc, narrow_v_desc)
    first_half: gl.constexpr = 0
    second_half: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_compute, (
                first_half, results, rows, rings, share, edges, unit, factor, block,
                WINDOWED, HEAD, SUMS, ROWS_KNOWN,
            )),
            (_compute, (
                second_half, results, rows, rings, share, edges, unit, factor, block,
                WINDOWED, HEAD, SUMS, ROWS_KNOWN,
            )),
            (_load, (descs, rings, share, edges, block, WINDOWED, HEAD)),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _load(descs, rings, share, edges, BLOCK: gl.constexpr, WINDOWED: gl.constexpr, HEAD: gl.constexpr):
    """The loading warp group."""
    q_desc, do_desc, k_desc, v_desc, narrow_k_desc, narrow_v_desc = descs
    queries, upstream, keys, values, narrow_keys, narrow_values = rings
    works, blocks, light, heads, group = share
    sets: gl.constexpr = queries[0].shape[0] // 2
    n = 0
    for turn in range(0, turns_of(works)):
        b, h, first = place_queries(work_of(turn), works, blocks, light, heads)
        for half in gl.static_range(2):
            place, phase = turn % sets * 2 + half, turn // sets & 1
            fetch(q_desc, b, h, first + half * ROWS, queries, place, phase)
            fetch(do_desc, b, h, first + half * ROWS, upstream, place, phase)
        n = produce_keys(
            k_desc, v_desc, narrow_k_desc, narrow_v_desc, keys, values, narrow_keys, narrow_values,
            b, h // group, first, turn, n, edges, BLOCK, WINDOWED, HEAD,
        )  # fmt: skip


@gluon.jit
def _compute(
    half: gl.constexpr, results, pointers, rings, share, edges, unit, factor,
    BLOCK: gl.constexpr, WINDOWED: gl.constexpr, HEAD: gl.constexpr, SUMS: gl.constexpr,
    ROWS_KNOWN: gl.constexpr,
):  # fmt: skip
    """A computing warp group: one half of the queries of each piece of work."""
    delta_ptr, tail_ptr, o_ptr, lse_ptr = pointers
    dq_desc, notes, near_dk_ptr, near_dv_ptr = results
    sums = (notes, near_dk_ptr, near_dv_ptr)
    queries, upstream, keys, values, narrow_keys, narrow_values = rings
    works, blocks, light, heads, group = share
    n_rows = edges[0]
    WIDTH: gl.constexpr = dq_desc.block_shape[3]
    dtype: gl.constexpr = dq_desc.dtype
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
        at = (b * heads + h).to(gl.int64) * n_rows + rows
        if ROWS_KNOWN:
            delta = gl.load(delta_ptr + at, mask=rows < n_rows, other=0.0)
            tail = gl.load(tail_ptr + at, mask=rows < n_rows, other=float("inf"))
        else:
            o = _load_rows(o_ptr, b * heads + h, mine, n_rows, WIDTH)
            lse = gl.load(lse_ptr + at, mask=rows < n_rows, other=float("-inf"))
        dq = gl.zeros([ROWS, WIDTH], gl.float32, OUT)
        place = turn % sets * 2 + half
        q = queries[0].index(place).reshape([ROWS, WIDTH])
        do = upstream[0].index(place).reshape([ROWS, WIDTH])
        mbarrier.wait(queries[1].index(place), turn // sets & 1)
        mbarrier.wait(upstream[1].index(place), turn // sets & 1)
        if not ROWS_KNOWN:
            delta, tail = _know_rows(o, do, lse)
            gl.store(delta_ptr + at, delta, mask=rows < n_rows)
            gl.store(tail_ptr + at, tail, mask=rows < n_rows)
        if HEAD == "narrow":
            piece = ((b * heads + h) * blocks + first // (2 * ROWS)) * 2 + half
            dq = _visit_narrow(
                dq, q, do, rows, delta, tail, head, narrow_keys, narrow_values, turn & 1, sums, piece, half,
                edges, unit, WEIGHTS, dtype, WINDOWED, SUMS,
            )  # fmt: skip
        for t in range(0, count):
            column, limit, partial = tile_of_keys(t, mine, head, more, start, edges, BLOCK, WINDOWED)
            stage, phase = (n + t) % stages, (n + t) // stages & 1
            k = keys[0].index(stage).reshape([BLOCK, WIDTH])
            v = values[0].index(stage).reshape([BLOCK, WIDTH])
            none = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
            mbarrier.wait(keys[1].index(stage), phase)
            x_running = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
            mbarrier.wait(values[1].index(stage), phase)
            dp_running = warpgroup_mma(do, v.permute((1, 0)), none, use_acc=False, is_async=True)
            x = warpgroup_mma_wait(1, deps=[x_running])
            if partial:
                x = hide_in_tile(x, rows, column, limit, edges, WINDOWED, HEAD)
            weights = gl.exp2(x * unit - gl.expand_dims(tail, 1))
            # It is there already. Without a wait here ptxas takes the exponentials after dp instead of beside it.
            mbarrier.wait(values[1].index(stage), phase)
            dp = warpgroup_mma_wait(0, deps=[dp_running])
            mbarrier.arrive(values[2].index(stage), count=1)
            ds = (weights * (dp - gl.expand_dims(delta, 1))).to(dtype)
            dq = warpgroup_mma(gl.convert_layout(ds, WEIGHTS), k, dq)
            mbarrier.arrive(keys[2].index(stage), count=1)
        n += count
        q.store((dq * factor).to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(dq_desc, [b, h, mine, 0], queries[0].index(place))
        tma.store_wait(pendings=0)
        mbarrier.arrive(upstream[2].index(place), count=1)
        mbarrier.arrive(queries[2].index(place), count=1)


@gluon.jit
def _load_rows(ptr, bh, first, n_rows, WIDTH: gl.constexpr):
    """64 rows of one head of a contiguous (B, H, S, D), each shared by a few threads; zero where there are none."""
    SPREAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    rows = gl.expand_dims(first + gl.arange(0, ROWS, gl.SliceLayout(1, SPREAD)), 1)
    cols = gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, SPREAD)), 0)
    at = (bh.to(gl.int64) * n_rows + rows) * WIDTH + cols
    return gl.load(ptr + at, mask=(rows < n_rows) & (at >= 0), other=0.0)


@gluon.jit
def _know_rows(o, do, lse):
    """(delta, tail) of 64 queries; an empty row gets a tail of +inf, so that it weighs nothing."""
    products = o.to(gl.float32) * do.load(o.type.layout).to(gl.float32)
    empty = lse == float("-inf")
    delta = gl.where(empty, 0.0, gl.convert_layout(gl.sum(products, 1), lse.type.layout))
    return delta, gl.where(empty, float("inf"), lse * _LOG2E)


@gluon.jit
def _visit_narrow(
    dq, q, do, rows, delta, tail, head, narrow_keys, narrow_values, phase, sums, piece, half: gl.constexpr,
    edges, unit, WEIGHTS: gl.constexpr, dtype: gl.constexpr, WINDOWED: gl.constexpr, SUMS: gl.constexpr,
):  # fmt: skip
    """Adds what the keys of the head's narrow tile send, and stores what they get from these queries."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW, 16])
    BY_ROW: gl.constexpr = gl.SliceLayout(1, LOGITS)
    width: gl.constexpr = q.shape[1]
    k = narrow_keys[0].index(0).reshape([NARROW, width])
    v = narrow_values[0].index(0).reshape([NARROW, width])
    none = gl.zeros([ROWS, NARROW], gl.float32, LOGITS)
    mbarrier.wait(narrow_keys[1].index(0), phase)
    x_running = warpgroup_mma(q, k.permute((1, 0)), none, use_acc=False, is_async=True)
    mbarrier.wait(narrow_values[1].index(0), phase)
    dp_running = warpgroup_mma(do, v.permute((1, 0)), none, use_acc=False, is_async=True)
    x, dp = warpgroup_mma_wait(0, deps=[x_running, dp_running])
    mbarrier.arrive(narrow_values[2].index(0), count=1)
    x = hide(x, gl.convert_layout(rows, BY_ROW), 0, head, edges, WINDOWED)
    weights = gl.exp2(x * unit - gl.expand_dims(gl.convert_layout(tail, BY_ROW), 1))
    ds = (weights * (dp - gl.expand_dims(gl.convert_layout(delta, BY_ROW), 1))).to(dtype)
    if SUMS:
        _sum_near(q, do, weights.to(dtype), ds, sums, piece, half, edges)
    dq = warpgroup_mma(gl.convert_layout(ds, WEIGHTS), k, dq)
    mbarrier.arrive(narrow_keys[2].index(0), count=1)
    return dq


@gluon.jit
def _sum_near(q, do, weights, ds, sums, piece, half: gl.constexpr, edges):
    """Stores what 64 queries send to the keys of the narrow tile, as dO^T weights and Q^T ds."""
    notes, near_dk_ptr, near_dv_ptr = sums
    width: gl.constexpr = q.shape[1]
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW, 16])
    notes.index(2 * half).store(weights)
    notes.index(2 * half + 1).store(ds)
    fence_async_shared()
    none = gl.zeros([width, NARROW], gl.float32, OUT)
    dv_running = warpgroup_mma(do.permute((1, 0)), notes.index(2 * half), none, use_acc=False, is_async=True)
    dk_running = warpgroup_mma(
        q.permute((1, 0)), notes.index(2 * half + 1), none, use_acc=False, is_async=True
    )
    dv, dk = warpgroup_mma_wait(0, deps=[dv_running, dk_running])
    columns = gl.maximum(edges[4], edges[5])
    cols = gl.expand_dims(gl.arange(0, NARROW, gl.SliceLayout(0, OUT)), 0)
    at = cols * width + gl.expand_dims(gl.arange(0, width, gl.SliceLayout(1, OUT)), 1)
    begin = piece.to(gl.int64) * columns * width
    gl.store(near_dv_ptr + begin + at, dv, mask=(cols < columns) & (at >= 0))
    gl.store(near_dk_ptr + begin + at, dk, mask=(cols < columns) & (at >= 0))
