"""dk and dv for Hopper: FlashAttention-3's backward (arXiv 2407.08608) for one block of keys, without atomics.

Tiles are transposed, (keys, queries), so that weights and their gradients, left operands of the products for dv and
dk, stay in registers. A warp group has 64 keys. v dO^T runs while it takes the exponentials of the same tile, and k Q^T
of the next tile follows dk's product without a gap. What is known of each query, tail and delta, comes with it by TMA.
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
    NUMBERS,
    ROWS,
    block_of,
    fetch,
    make_ring,
    turns_of,
    work_of,
)


@gluon.jit(do_not_specialize=(*NUMBERS, "kv_heads", "parts", "summed", "done"))
def keys_kernel(
    q_desc, do_desc, k_desc, v_desc, dk_desc, dv_desc, tail_desc, delta_desc, far_dk_ptr, far_dv_ptr,
    works, blocks, light, kv_heads, group, n_rows, n_cols, upper, lower, sinks, prefix,
    parts, summed, done, unit, factor,
    STAGES: gl.constexpr, SETS: gl.constexpr, WINDOWED: gl.constexpr,
):  # fmt: skip
    """dk, dv; far_dk, far_dv (B * Hkv, parts, summed, .) fp32: what else is sent to the first `summed` keys.

    It is all that the first `done` keys get, sinks and prefix have to be 0 then; or it comes from beyond the window.
    SETS of keys and values are on chip: with two, the next piece of work's arrive during this one.
    """
    dtype: gl.constexpr = q_desc.dtype
    keys = make_ring(dtype, k_desc, 2 * SETS, 1)
    values = make_ring(dtype, v_desc, 2 * SETS, 1)
    queries = make_ring(dtype, q_desc, STAGES, 2)
    upstream = make_ring(dtype, do_desc, STAGES, 2)
    tails = gl.allocate_shared_memory(gl.float32, [STAGES] + tail_desc.block_shape, tail_desc.layout)
    deltas = gl.allocate_shared_memory(gl.float32, [STAGES] + delta_desc.block_shape, delta_desc.layout)
    fence_async_shared()
    edges = (n_rows, n_cols, upper, lower, sinks, prefix)
    rings = (keys, values, queries, upstream, tails, deltas)
    share = (works, blocks, light, kv_heads, group)
    block: gl.constexpr = q_desc.block_shape[2]
    results = (dk_desc, dv_desc)
    far = (far_dk_ptr, far_dv_ptr, parts, summed, done)
    descs = (q_desc, do_desc, k_desc, v_desc, tail_desc, delta_desc)
    first_half: gl.constexpr = 0
    second_half: gl.constexpr = 1
    gl.warp_specialize(
        [
            (_compute, (first_half, results, far, rings, share, edges, unit, factor, block, WINDOWED)),
            (_compute, (second_half, results, far, rings, share, edges, unit, factor, block, WINDOWED)),
            (_load, (descs, rings, share, edges, block, WINDOWED)),
        ],
        [4, 4],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _seen(first, count: gl.constexpr, edges, WINDOWED: gl.constexpr):
    """[start, stop): the queries that see some of `count` keys from `first` on; those far behind sinks are left out."""
    n_rows, n_cols, upper, lower, sinks, prefix = edges
    start, stop = gl.maximum(first - upper, 0), n_rows
    if WINDOWED:
        stop = gl.minimum(gl.minimum(first + count, n_cols) - 1 - lower, n_rows)
    return gl.where(first < prefix, 0, start), gl.where(first < prefix, n_rows, stop)


@gluon.jit
def _tiles(first, edges, BLOCK: gl.constexpr, WINDOWED: gl.constexpr):
    """(start, stop, tiles): the queries of one head that see some of the 128 keys from `first` on."""
    start, stop = _seen(first, 2 * ROWS, edges, WINDOWED)
    # The numbers of a tile come by TMA, whose innermost coordinate has to lie at 16 bytes.
    start = start // BLOCK * BLOCK
    return start, stop, gl.cdiv(gl.maximum(stop - start, 0), BLOCK)


@gluon.jit
def _load(descs, rings, share, edges, BLOCK: gl.constexpr, WINDOWED: gl.constexpr):
    """The loading warp group."""
    q_desc, do_desc, k_desc, v_desc, tail_desc, delta_desc = descs
    keys, values, queries, upstream, tails, deltas = rings
    works, blocks, light, kv_heads, group = share
    stages: gl.constexpr = queries[0].shape[0]
    sets: gl.constexpr = keys[0].shape[0] // 2
    n = 0
    for turn in range(0, turns_of(works)):
        bh, block = block_of(work_of(turn), works, blocks, light)
        first = block * (2 * ROWS)
        start, stop, tiles = _tiles(first, edges, BLOCK, WINDOWED)
        b, kv_head = bh // kv_heads, bh % kv_heads
        for half in gl.static_range(2):
            mine, phase = turn % sets * 2 + half, turn // sets & 1
            fetch(k_desc, b, kv_head, first + half * ROWS, keys, mine, phase)
            fetch(v_desc, b, kv_head, first + half * ROWS, values, mine, phase)
        for g in range(0, group):
            h = kv_head * group + g
            for t in range(0, tiles):
                row = start + t * BLOCK
                stage, phase = n % stages, n // stages & 1
                _fetch_with(q_desc, tail_desc, b, h, bh * group + g, row, queries, tails, stage, phase)
                _fetch_with(do_desc, delta_desc, b, h, bh * group + g, row, upstream, deltas, stage, phase)
                n += 1


@gluon.jit
def _fetch_with(desc, number_desc, b, h, line, row, ring, numbers, stage, phase):
    """`fetch`, and with the rows one number each."""
    buffers, full, empty = ring
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes + number_desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [b, h, row, 0], full.index(stage), buffers.index(stage))
    tma.async_copy_global_to_shared(number_desc, [line, row], full.index(stage), numbers.index(stage))


@gluon.jit
def _compute(
    half: gl.constexpr, results, far, rings, share, edges, unit, factor, BLOCK: gl.constexpr, WINDOWED: gl.constexpr
):  # fmt: skip
    """A computing warp group: one half of the keys of each piece of work."""
    dk_desc, dv_desc = results
    keys, values, queries, upstream, tails, deltas = rings
    works, blocks, light, kv_heads, group = share
    WIDTH: gl.constexpr = dk_desc.block_shape[3]
    dtype: gl.constexpr = dk_desc.dtype
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    sets: gl.constexpr = keys[0].shape[0] // 2
    tile_rings = (queries, upstream, tails, deltas)
    n = 0
    for turn in range(0, turns_of(works)):
        bh, block = block_of(work_of(turn), works, blocks, light)
        first = block * (2 * ROWS)
        start, stop, tiles = _tiles(first, edges, BLOCK, WINDOWED)
        mine = first + half * ROWS
        skip, end = _own_tiles(mine, start, stop, tiles, edges, BLOCK, WINDOWED)
        full_start, full_stop = _full_rows(mine, stop, far[4], edges, WINDOWED)
        bounds = (mine, stop, full_start, full_stop, far[4])
        at = turn % sets * 2 + half
        k = keys[0].index(at).reshape([ROWS, WIDTH])
        v = values[0].index(at).reshape([ROWS, WIDTH])
        dk, dv = _far_sums(far, bh, mine, WIDTH, OUT)
        mbarrier.wait(keys[1].index(at), turn // sets & 1)
        mbarrier.wait(values[1].index(at), turn // sets & 1)
        for _ in range(0, group):
            _pass_over(queries, upstream, n, n + skip)
            if skip < end:
                last, row = n + end - 1, start + skip * BLOCK
                x_running = _multiply(k, queries, n + skip, BLOCK)
                for i in range(n + skip, last):
                    dk, dv, x_running = _visit(
                        dk, dv, x_running, k, v, tile_rings, i, row, bounds, edges, unit, WINDOWED, MORE=True
                    )  # fmt: skip
                    row += BLOCK
                dk, dv, x_running = _visit(
                    dk, dv, x_running, k, v, tile_rings, last, row, bounds, edges, unit, WINDOWED, MORE=False
                )  # fmt: skip
            _pass_over(queries, upstream, n + end, n + tiles)
            n += tiles
        k.store((dk * factor).to(dtype))
        v.store(dv.to(dtype))
        fence_async_shared()
        b, kv_head = bh // kv_heads, bh % kv_heads
        tma.async_copy_shared_to_global(dk_desc, [b, kv_head, mine, 0], keys[0].index(at))
        tma.async_copy_shared_to_global(dv_desc, [b, kv_head, mine, 0], values[0].index(at))
        tma.store_wait(pendings=0)
        mbarrier.arrive(keys[2].index(at), count=1)
        mbarrier.arrive(values[2].index(at), count=1)


@gluon.jit
def _own_tiles(mine, start, stop, tiles, edges, BLOCK: gl.constexpr, WINDOWED: gl.constexpr):
    """[skip, end): which of the tiles of 128 keys hold queries that see some of the 64 from `mine` on."""
    own_start, own_stop = _seen(mine, ROWS, edges, WINDOWED)
    own_stop = gl.where(mine < edges[4], stop, gl.minimum(own_stop, stop))
    skip = gl.minimum(gl.maximum(own_start - start, 0) // BLOCK, tiles)
    return skip, gl.maximum(gl.cdiv(gl.maximum(own_stop - start, 0), BLOCK), skip)


@gluon.jit
def _full_rows(mine, stop, done, edges, WINDOWED: gl.constexpr):
    """[start, stop): the queries that see all of the 64 keys from `mine` on."""
    n_rows, n_cols, upper, lower, sinks, prefix = edges
    full_start, full_stop = mine + ROWS - 1 - upper, stop
    if WINDOWED:
        full_stop = gl.minimum(mine - lower, stop)
    inside = mine + ROWS <= prefix
    full_stop = gl.where(mine < done, 0, full_stop)
    return gl.where(inside, 0, full_start), gl.where(inside, stop, full_stop)


@gluon.jit
def _pass_over(queries, upstream, begin, end):
    """Says of the tiles [begin, end) that they have been read; only once they are there, or one turn counted as two."""
    stages: gl.constexpr = queries[0].shape[0]
    for i in range(begin, end):
        stage, phase = i % stages, i // stages & 1
        mbarrier.wait(queries[1].index(stage), phase)
        mbarrier.arrive(queries[2].index(stage), count=1)
        mbarrier.wait(upstream[1].index(stage), phase)
        mbarrier.arrive(upstream[2].index(stage), count=1)


@gluon.jit
def _multiply(left, ring, i, BLOCK: gl.constexpr):
    """left times the transpose of tile i, on its way."""
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    stages: gl.constexpr = ring[0].shape[0]
    right = ring[0].index(i % stages).reshape([BLOCK, left.shape[1]]).permute((1, 0))
    mbarrier.wait(ring[1].index(i % stages), i // stages & 1)
    none = gl.zeros([ROWS, BLOCK], gl.float32, LOGITS)
    return warpgroup_mma(left, right, none, use_acc=False, is_async=True)


@gluon.jit
def _visit(
    dk, dv, x_running, k, v, rings, i, row, bounds, edges, unit, WINDOWED: gl.constexpr, MORE: gl.constexpr
):  # fmt: skip
    """Adds what tile i, the queries from `row` on, sends to dk and dv; begins with the next tile if there are MORE."""
    queries, upstream, tails, deltas = rings
    mine, stop, full_start, full_stop, done = bounds
    stages: gl.constexpr = queries[0].shape[0]
    BLOCK: gl.constexpr = tails.shape[2]
    width: gl.constexpr = k.shape[1]
    dtype: gl.constexpr = k.dtype
    BY_QUERY: gl.constexpr = gl.SliceLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16]))
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    stage = i % stages
    q = queries[0].index(stage).reshape([BLOCK, width])
    do = upstream[0].index(stage).reshape([BLOCK, width])
    # ptxas gives up its pipeline if something is left running that began before this turn of the loop.
    x = warpgroup_mma_wait(0, deps=[x_running])
    dp_running = _multiply(v, upstream, i, BLOCK)
    if (row < full_start) | (row + BLOCK > full_stop):
        x = _hide_queries(x, row, stop, mine, done, edges, WINDOWED)
    tail = tails.index(stage).reshape([BLOCK]).load(BY_QUERY)
    weights = gl.exp2(x * unit - gl.expand_dims(tail, 0))
    p = gl.convert_layout(weights.to(dtype), WEIGHTS)
    dv_running = warpgroup_mma(p, do, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp_running])
    delta = deltas.index(stage).reshape([BLOCK]).load(BY_QUERY)
    ds = gl.convert_layout((weights * (dp - gl.expand_dims(delta, 0))).to(dtype), WEIGHTS)
    dk_running = warpgroup_mma(ds, q, dk, is_async=True)
    dv, _ = warpgroup_mma_wait(1, deps=[dv_running, p])
    mbarrier.arrive(upstream[2].index(stage), count=1)
    if MORE:
        x_running = _multiply(k, queries, i + 1, BLOCK)
        dk, _ = warpgroup_mma_wait(1, deps=[dk_running, ds])
    else:
        dk, _ = warpgroup_mma_wait(0, deps=[dk_running, ds])
    mbarrier.arrive(queries[2].index(stage), count=1)
    return dk, dv, x_running


@gluon.jit
def _far_sums(far, bh, mine, WIDTH: gl.constexpr, OUT: gl.constexpr):
    """(dk, dv) of 64 keys to begin with: zero, or for the first keys the sum of their parts."""
    far_dk_ptr, far_dv_ptr, parts, summed, done = far
    dk, dv = gl.zeros([ROWS, WIDTH], gl.float32, OUT), gl.zeros([ROWS, WIDTH], gl.float32, OUT)
    if mine < summed:
        cols = gl.expand_dims(mine + gl.arange(0, ROWS, gl.SliceLayout(1, OUT)), 1)
        at = cols * WIDTH + gl.expand_dims(gl.arange(0, WIDTH, gl.SliceLayout(0, OUT)), 0)
        for part in range(0, parts):
            begin = (bh * parts + part).to(gl.int64) * summed * WIDTH
            dk += gl.load(far_dk_ptr + begin + at, mask=(cols < summed) & (at >= 0), other=0.0)
            dv += gl.load(far_dv_ptr + begin + at, mask=(cols < summed) & (at >= 0), other=0.0)
    return dk, dv


@gluon.jit
def _hide_queries(x, row, stop, mine, done, edges, WINDOWED: gl.constexpr):
    """The logits x of the keys from `mine` on and the queries from `row` on, -inf where hidden or not before `stop`.

    Each key is seen by queries that follow each other: two comparisons with numbers of the key.
    """
    n_rows, n_cols, upper, lower, sinks, prefix = edges
    cols = mine + gl.arange(0, ROWS, gl.SliceLayout(1, x.type.layout))
    rows = gl.expand_dims(gl.arange(0, x.type.shape[1], gl.SliceLayout(0, x.type.layout)), 0)
    seen_from = gl.where(cols < done, stop, gl.where(cols < prefix, 0, cols - upper))
    seen = rows >= gl.expand_dims(seen_from - row, 1)
    if WINDOWED:
        seen_until = gl.where(cols < gl.maximum(sinks, prefix), stop, gl.minimum(cols - lower, stop))
        seen = seen & (rows < gl.expand_dims(seen_until - row, 1))
    else:
        seen = seen & (rows < stop - row)
    return gl.where(seen, x, float("-inf"))
