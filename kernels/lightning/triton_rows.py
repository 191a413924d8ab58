"""Tiles of rows of one head, through tensor descriptors or pointers."""

import triton
import triton.language as tl

from attnopt.kernels._triton import offset


@triton.jit
def address(ptr, stride_b, stride_h, stride_s, stride_d, b, h, rows, columns):
    """Addresses of a tile of one head; rows and columns come shaped (n, 1) and (1, m), or turned."""
    return (
        ptr + offset(b, stride_b) + offset(h, stride_h) + offset(rows, stride_s) + offset(columns, stride_d)
    )


@triton.jit
def load_rows(
    source, stride_b, stride_h, stride_s, stride_d, b, h, first, column, rows_end, columns_end,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Rows [first, first + ROWS) and columns [column, column + COLUMNS) of one head; zeros beyond the ends."""
    if BULK:
        tile = source.load([b, h, first, column]).reshape(ROWS, COLUMNS)
    else:
        rows = first + tl.arange(0, ROWS)[:, None]
        columns = column + tl.arange(0, COLUMNS)[None, :]
        at = address(source, stride_b, stride_h, stride_s, stride_d, b, h, rows, columns)
        tile = tl.load(at, mask=(rows < rows_end) & (columns < columns_end), other=0.0)
    return tile


@triton.jit
def store_rows(
    target, stride_b, stride_h, stride_s, stride_d, b, h, first, column, rows_end, columns_end, tile,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """Writes what `load_rows` would read."""
    if BULK:
        target.store([b, h, first, column], tile.reshape(1, 1, ROWS, COLUMNS))
    else:
        rows = first + tl.arange(0, ROWS)[:, None]
        columns = column + tl.arange(0, COLUMNS)[None, :]
        at = address(target, stride_b, stride_h, stride_s, stride_d, b, h, rows, columns)
        tl.store(at, tile, mask=(rows < rows_end) & (columns < columns_end))


@triton.jit
def sequence_of(starts_ptr, bh, H, S, slices, CHUNK: tl.constexpr):
    """Where the rows of sequence bh // H lie, one in each batch row or, packed, one behind the other in a single one.

    Returns the batch row, the first row and the number of rows; then, in memory by head, its first row and its first
    chunk. Packed, sequence i has room for its chunks from number start // CHUNK + i on.
    """
    b = bh // H
    batch = b
    start = 0
    length = S
    rows = offset(bh, S)
    chunks = offset(bh, tl.cdiv(S, CHUNK))
    if starts_ptr is not None:
        start = tl.load(starts_ptr + b).to(tl.int32)
        length = tl.load(starts_ptr + b + 1).to(tl.int32) - start
        batch = 0
        rows = offset(bh % H, S) + start
        sequences = tl.num_programs(0) // (slices * H)
        chunks = offset(bh % H, S // CHUNK + sequences) + (start // CHUNK + b)
    return batch, start, length, rows, chunks
