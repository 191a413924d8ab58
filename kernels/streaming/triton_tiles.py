"""What the forward and the backward kernels share: tile sizes, which tiles to visit, logits of a tile."""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels._triton import INTERPRETED, dot_precision, next_power_of_two, offset
from attnopt.kernels.streaming.problem import Problem

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: Numbers that change with the lengths: no kernel is compiled anew because one is 1, or a multiple of 16.
NUMBERS = ("upper", "lower", "sinks", "prefix", "parts", "diagonal")


@dataclass(frozen=True, slots=True)
class Tiles:
    """Queries and keys in a tile, warps that share it, and stages of the load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int

    def shared_bytes(self, width: int, itemsize: int, dense: int) -> int:
        """Shared memory, roughly: two resident operands on the longer side, two streamed ones for every stage.

        width: padded channels; itemsize: bytes of an operand's element; dense: bytes per score of mask and bias.
        """
        resident, streamed = max(self.queries, self.keys), min(self.queries, self.keys)
        rows = 2 * width * itemsize * (resident + streamed * self.stages)
        return rows + dense * self.queries * self.keys * self.stages + 2048


#: From the fastest where it fits to the one that always does. The resident side is the longer one.
BY_QUERIES = (
    Tiles(128, 64, 8, 3),
    Tiles(128, 64, 8, 2),
    Tiles(64, 64, 4, 2),
    Tiles(64, 32, 4, 2),
    Tiles(32, 32, 4, 1),
)
BY_KEYS = (Tiles(64, 128, 8, 2), Tiles(64, 64, 4, 2), Tiles(32, 64, 4, 2), Tiles(32, 32, 4, 1))
#: Exact fp32 products are unrolled multiply-adds, not tensor cores: larger tiles spill, and compile for minutes.
UNROLLED = (Tiles(32, 32, 8, 1),)
SMALLEST = Tiles(16, 16, 4, 1)


def choose(candidates: tuple[Tiles, ...], width: int, itemsize: int, dense: int, shared: int) -> Tiles:
    """The first candidate that fits into `shared` bytes; the rest as in `Tiles.shared_bytes`."""
    if itemsize > 2:
        candidates = UNROLLED if width <= 128 else ()
    fitting = (t for t in candidates if t.shared_bytes(width, itemsize, dense) <= shared)
    found = next(fitting, SMALLEST)
    return replace(found, warps=8) if width > 128 else found


def tiles_for(problem: Problem, candidates: tuple[Tiles, ...]) -> Tiles:
    """The choice for a problem on its device."""
    width = padded(max(problem.q.shape[3], problem.v.shape[3]))
    bias = 0 if problem.bias is None else problem.bias.element_size()
    dense = bias + (problem.mask is not None)
    return choose(candidates, width, problem.q.element_size(), dense, shared_memory(problem.q.device))


def shared_memory(device: torch.device) -> int:
    """Shared memory that one program may use, in bytes; without a GPU, what the smaller ones have."""
    if device.type != "cuda":
        return 99 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 48 * 1024))


def padded(channels: int) -> int:
    """Channels of a tile. 16 gave wrong products of weights and values on Hopper (perf-log, streaming version 2)."""
    return next_power_of_two(channels, least=16 if INTERPRETED else 32)


@triton.jit
def split(start, stop, full_start, full_stop, BLOCK: tl.constexpr):
    """Cuts [start, stop) into tiles: `before` partial ones, full ones in [first, last), `after` partial ones.

    Full tiles lie inside [full_start, full_stop). Returns (before, first, last, after).
    """
    before = tl.cdiv(tl.maximum(tl.minimum(full_start, stop) - start, 0), BLOCK)
    first = start + before * BLOCK
    last = first + tl.maximum(tl.minimum(full_stop, stop) - first, 0) // BLOCK * BLOCK
    after = tl.cdiv(tl.maximum(stop - last, 0), BLOCK)
    return before, first, last, after


@triton.jit
def visible(rows, cols, columns, upper, lower, sinks, prefix, WINDOWED: tl.constexpr):
    """`Reach.tile` for broadcastable positions, and False beyond the last column."""
    seen = cols <= rows + upper
    if WINDOWED:
        seen = seen & ((cols > rows + lower) | (cols < sinks))
    return (seen | (cols < prefix)) & (cols < columns)


@triton.jit
def load_rows(ptr, index, s_row, s_col, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Rows `index` of a matrix, (len(index), PADDED); zero where `inside` is False and beyond WIDTH columns."""
    col = tl.arange(0, PADDED)
    at = ptr + offset(index, s_row)[:, None] + offset(col, s_col)[None, :]
    return tl.load(at, mask=inside[:, None] & (col < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, index, s_row, tile, inside, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Writes `tile` to rows `index` of a matrix whose columns are adjacent."""
    col = tl.arange(0, PADDED)
    at = ptr + offset(index, s_row)[:, None] + col[None, :]
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=inside[:, None] & (col < WIDTH)[None, :])


@triton.jit
def signed(q, SIGN: tl.constexpr):
    """q times the sign of the scale, so that what multiplies the scores afterwards is positive."""
    if SIGN == 1:
        return q
    return (q.to(tl.float32) * SIGN).to(q.dtype)


@triton.jit
def tanh(x):
    """tanh, by its series where the quotient of exponentials would cancel."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    quotient = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def logits(
    qk, rows, cols, limit, keep,
    n_rows, upper, lower, sinks, prefix,
    bias_ptr, bias_sq, bias_sk, mask_ptr, mask_sq, mask_sk,
    scale, softcap, tilt, origin, diagonal,
    structured, WINDOWED: tl.constexpr, PLAIN: tl.constexpr, CAPPED: tl.constexpr,
    BIAS: tl.constexpr, MASK: tl.constexpr, PADDING: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Logits of a tile of q k^T, -inf where hidden; `rows`, `cols`, `keep` broadcast to the tile, either way round.

    PLAIN leaves the scale to whoever takes the exponential; else the logits are in natural units. structured: whether
    some query sees only a part of the tile. One loop with this branch keeps the loads of all tiles in one pipeline.
    tilt: the head's slope, which multiplies `distance`.
    """
    x = qk
    if not PLAIN:
        x = x * scale
    if CAPPED:
        x = softcap * tanh(x / softcap)
    inside = (rows < n_rows) & (cols < limit)
    if BIAS:
        at = bias_ptr + offset(rows, bias_sq) + offset(cols, bias_sk)
        x += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if ALIBI:
        x += tilt * distance(rows, cols, origin, diagonal, ALIBI)
    if structured:
        x = tl.where(visible(rows, cols, limit, upper, lower, sinks, prefix, WINDOWED), x, -float("inf"))
    if MASK:
        at = mask_ptr + offset(rows, mask_sq) + offset(cols, mask_sk)
        x = tl.where(tl.load(at, mask=inside, other=0) != 0, x, -float("inf"))
    if PADDING:
        x = tl.where(keep, x, -float("inf"))
    return x


@triton.jit
def distance(rows, cols, origin, diagonal, ALIBI: tl.constexpr):
    """What a slope multiplies, fp32: j - i - diagonal (ALIBI 1), or minus its magnitude (2).

    Positions are counted from `origin`, the tile's first row: exact up to 2^24 from there, however long the sequence.
    """
    away = (cols - (origin + diagonal)).to(tl.float32) - (rows - origin).to(tl.float32)
    if ALIBI == 2:
        away = -tl.abs(away)
    return away


@triton.jit
def tilt_of(slope_ptr, b, h, slope_sb, slope_sh, heads, ALIBI: tl.constexpr):
    """The slope of one head, fp32; 0 where there is none."""
    tilt = 0.0
    if ALIBI:
        at = slope_ptr + offset(b, slope_sb) + offset(h, slope_sh)
        tilt = tl.load(at, mask=h < heads, other=0.0).to(tl.float32)
    return tilt


@triton.jit
def kept(keep_ptr, cols, keep_ss, limit, PADDING: tl.constexpr):
    """Which of the columns exist below `limit` and are not padding."""
    inside = cols < limit
    if PADDING:
        inside = inside & (tl.load(keep_ptr + offset(cols, keep_ss), mask=inside, other=0) != 0)
    return inside


@triton.jit
def raise_to(x, level, unit, PLAIN: tl.constexpr):
    """exp2(unit * (x - level)), level one per row; PLAIN as one multiply-add, else exact where both are large."""
    if PLAIN:
        return tl.exp2(x * unit - level * unit)
    return tl.exp2((x - level) * unit)


@triton.jit
def recall(x, peak, tail, unit, PLAIN: tl.constexpr):
    """The softmax weights of a tile, from its logits and the statistics of its rows."""
    if PLAIN:
        return tl.exp2(x * unit - tail)
    return tl.exp2((x - peak) * unit - tail)


@triton.jit
def slope(scores, scale, softcap):
    """The derivative of softcap * tanh(x / softcap) at the scaled scores."""
    capped = tanh(scores * scale / softcap)
    return 1 - capped * capped


def scalars(problem: Problem) -> dict[str, Any]:
    """Sizes, structure, scale and the optional tensors of a problem, by the names that the kernels give them."""
    exact = problem.q.element_size() > 2
    more = (problem.bias, problem.softcap, problem.sink_logits, problem.slopes)
    plain = not exact and all(extra is None for extra in more)
    magnitude = abs(problem.scale) or 1.0
    where = problem.reach
    return {
        "n_rows": where.rows,
        "n_cols": where.columns,
        "upper": where.upper,
        "lower": where.lower,
        "sinks": where.sinks if where.windowed else 0,
        "prefix": where.prefix,
        "unit": (magnitude if plain else 1.0) * LOG2E.value,
        "scale": magnitude,
        "softcap": problem.softcap or 1.0,
        "SIGN": (problem.scale > 0) - (problem.scale < 0),
        "WINDOWED": where.windowed,
        "PLAIN": plain,
        "CAPPED": problem.softcap is not None,
        "PRECISION": dot_precision(problem.q.dtype),
        **_optional(problem),
    }


def _optional(problem: Problem) -> dict[str, Any]:
    full = (*problem.q.shape[:3], problem.k.shape[2])
    absent = problem.q, (0, 0, 0, 0)
    bias, bias_strides = absent if problem.bias is None else _spread(problem.bias, full)
    mask, mask_strides = absent if problem.mask is None else _spread(problem.mask.view(torch.uint8), full)
    keep, slopes = problem.key_padding, problem.slopes
    return {
        "bias_ptr": bias,
        **dict(zip(("bias_sb", "bias_sh", "bias_sq", "bias_sk"), bias_strides, strict=True)),
        "mask_ptr": mask,
        **dict(zip(("mask_sb", "mask_sh", "mask_sq", "mask_sk"), mask_strides, strict=True)),
        "keep_ptr": problem.q if keep is None else keep.view(torch.uint8),
        "keep_sb": 0 if keep is None else keep.stride(0),
        "keep_ss": 0 if keep is None else keep.stride(1),
        "slope_ptr": problem.q if slopes is None else slopes,
        "slope_sb": 0 if slopes is None or slopes.shape[0] == 1 else slopes.stride(0),
        "slope_sh": 0 if slopes is None else slopes.stride(1),
        "diagonal": problem.diagonal,
        "ALIBI": 0 if slopes is None else 2 if problem.symmetric else 1,
        "BIAS": problem.bias is not None,
        "MASK": problem.mask is not None,
        "PADDING": keep is not None,
    }


def _spread(x: Tensor, full: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    return x, x.expand(full).stride()


def strides(name: str, x: Tensor) -> dict[str, int]:
    """The strides of a (B, H, S, D) tensor as `name_sb`, `name_sh`, `name_ss`, `name_sd`."""
    return {f"{name}_s{axis}": size for axis, size in zip("bhsd", x.stride(), strict=True)}
