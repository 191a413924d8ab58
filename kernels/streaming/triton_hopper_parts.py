"""What the Hopper kernels share: places of work, which keys a tile holds, masks, barriers; written in Gluon.

Warp specialization as in FlashAttention-3 (arXiv 2407.08608, section 3.1): one warp group loads by TMA, two compute 64
rows each, and nothing but mbarriers stands between them, so that one group's exponentials overlap the other's products.

A ring is a tuple (buffers, full, empty): shared memory and two mbarriers for each of its stages. `edges` are the
numbers of `Reach`: (n_rows, n_cols, upper, lower, sinks, prefix).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

#: Rows of one computing warp group: what one wgmma multiplies.
ROWS = gl.constexpr(64)
#: Columns of the tile for a head that fits into it; TMA and wgmma want 8 or more.
NARROW = gl.constexpr(16)
#: Numbers that change with the lengths: no kernel is compiled anew because one is 1, or a multiple of 16.
NUMBERS = (
    "works", "blocks", "light", "heads", "group", "n_rows", "n_cols", "upper", "lower", "sinks", "prefix", "unit",
)  # fmt: skip


@gluon.jit
def make_ring(dtype: gl.constexpr, desc, stages: gl.constexpr, readers: gl.constexpr):
    """A ring of `stages` blocks of `desc`; a stage is empty once `readers` warp groups have said so."""
    buffers = gl.allocate_shared_memory(dtype, [stages] + desc.block_shape, desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [stages, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(stages):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=readers)
    return buffers, full, empty


@gluon.jit
def fetch(desc, b, h, row, ring, stage, phase):
    """Loads the block of `desc` from `row` on into a stage, once it has been read `phase` times (its parity)."""
    buffers, full, empty = ring
    mbarrier.wait(empty.index(stage), phase ^ 1)
    mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [b, h, row, 0], full.index(stage), buffers.index(stage))


@gluon.jit
def work_of(turn):
    """The number of this program's piece of work in its n-th turn: programs are served to and fro.

    Pieces become smaller with their numbers, so who gets the larger ones in one turn gets the smaller ones in the next.
    """
    place, programs = gl.program_id(0), gl.num_programs(0)
    return turn * programs + gl.where(turn % 2 == 0, place, programs - 1 - place)


@gluon.jit
def turns_of(works):
    """How many pieces of work this program takes."""
    full = works // gl.num_programs(0)
    return full + gl.where(work_of(full) < works, 1, 0)


@gluon.jit
def block_of(work, works, blocks, light):
    """(line, block) of a piece of work: first the blocks before the last `light` of each line, one line after another.

    Of those left, with less to do the later they come, all lines' first, then all lines' second, and so on.
    """
    lines, heavy = works // blocks, blocks - light
    late = work - lines * heavy
    some = gl.maximum(heavy, 1)
    line = gl.where(late < 0, work // some, late % lines)
    return line, gl.where(late < 0, work % some, heavy + late // lines)


@gluon.jit
def place_queries(work, works, blocks, light, heads):
    """(b, h, first row) of a piece of work: 128 queries of a head; later ones, which may see more keys, first."""
    bh, block = block_of(work, works, blocks, light)
    return bh // heads, bh % heads, (blocks - 1 - block) * (2 * ROWS)


@gluon.jit
def keys_of(first, edges, BLOCK: gl.constexpr, WINDOWED: gl.constexpr, HEAD: gl.constexpr):
    """(head, more, start, count): the tiles of BLOCK keys that the 128 queries from `first` on see.

    `more` tiles from column 0 hold the head, unless it has a narrow tile of its own; count - more follow from `start`.
    """
    n_rows, n_cols, upper, lower, sinks, prefix = edges
    last = gl.minimum(first + 2 * ROWS, n_rows)
    head = gl.maximum(prefix, gl.minimum(sinks, last + upper))
    start = head
    if WINDOWED:
        start = gl.maximum(first + lower + 1, head)
    more = 0
    if HEAD == "tiles":
        more = gl.cdiv(head, BLOCK)
    count = gl.cdiv(gl.maximum(gl.minimum(last + upper, n_cols) - start, 0), BLOCK) + more
    return head, more, start, count


@gluon.jit
def tile_of_keys(t, mine, head, more, start, edges, BLOCK: gl.constexpr, WINDOWED: gl.constexpr):
    """(first column, limit, partial) of tile t: whether some of the 64 queries from `mine` on miss some of its keys."""
    n_rows, n_cols, upper, lower, sinks, prefix = edges
    in_head = t < more
    column = gl.where(in_head, t * BLOCK, start + (t - more) * BLOCK)
    limit = gl.where(in_head, head, n_cols)
    partial = in_head | (column + BLOCK > gl.minimum(mine + upper + 1, n_cols))
    if WINDOWED:
        partial = partial | (column < mine + ROWS + lower)
    return column, limit, partial


@gluon.jit
def visible(rows, cols, limit, edges, WINDOWED: gl.constexpr):
    """`Reach.tile`: whether query and key, which broadcast, see each other, below the column `limit`."""
    n_rows, n_cols, upper, lower, sinks, prefix = edges
    back = rows + upper - cols
    seen = back >= 0
    if WINDOWED:
        seen = seen & ((back < upper - lower) | (cols < sinks))
    return (seen | (cols < prefix)) & (cols < limit)


@gluon.jit
def hide(x, rows, column, limit, edges, WINDOWED: gl.constexpr):
    """The logits x of the queries `rows` and the keys from `column` on, -inf where hidden."""
    cols = column + gl.arange(0, x.type.shape[1], gl.SliceLayout(0, x.type.layout))
    seen = visible(gl.expand_dims(rows, 1), gl.expand_dims(cols, 0), limit, edges, WINDOWED)
    return gl.where(seen, x, float("-inf"))


@gluon.jit
def clip(x, rows, column, limit, edges, WINDOWED: gl.constexpr):
    """`hide` where no key from `column` on belongs to the head: two comparisons with numbers of the row."""
    n_rows, n_cols, upper, lower, sinks, prefix = edges
    cols = gl.expand_dims(gl.arange(0, x.type.shape[1], gl.SliceLayout(0, x.type.layout)), 0)
    seen = cols < gl.expand_dims(gl.minimum(rows + upper + 1, limit) - column, 1)
    if WINDOWED:
        seen = seen & (cols > gl.expand_dims(rows + lower - column, 1))
    return gl.where(seen, x, float("-inf"))


@gluon.jit
def hide_in_tile(x, rows, column, limit, edges, WINDOWED: gl.constexpr, HEAD: gl.constexpr):
    """`hide` for a tile of `tile_of_keys`."""
    if HEAD == "tiles":
        x = hide(x, rows, column, limit, edges, WINDOWED)
    else:
        x = clip(x, rows, column, limit, edges, WINDOWED)
    return x


@gluon.jit
def produce_keys(
    k_desc, v_desc, narrow_k_desc, narrow_v_desc, keys, values, narrow_keys, narrow_values,
    b, kv_head, first, turn, n, edges, BLOCK: gl.constexpr, WINDOWED: gl.constexpr, HEAD: gl.constexpr,
):  # fmt: skip
    """Loads the keys and values that 128 queries see; n tiles were loaded before; returns how many are now."""
    head, more, start, count = keys_of(first, edges, BLOCK, WINDOWED, HEAD)
    if HEAD == "narrow":
        fetch(narrow_k_desc, b, kv_head, 0, narrow_keys, 0, turn & 1)
        fetch(narrow_v_desc, b, kv_head, 0, narrow_values, 0, turn & 1)
    stages: gl.constexpr = keys[0].shape[0]
    for t in range(0, count):
        column = gl.where(t < more, t * BLOCK, start + (t - more) * BLOCK)
        stage, phase = (n + t) % stages, (n + t) // stages & 1
        fetch(k_desc, b, kv_head, column, keys, stage, phase)
        fetch(v_desc, b, kv_head, column, values, stage, phase)
    return n + count
