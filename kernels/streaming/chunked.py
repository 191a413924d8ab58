"""Exact softmax attention in plain torch, block by block: only the keys that a block of queries sees are touched.

Time O(Sq (window + sinks)), temporary memory a few tiles of about `TILE` scores. The backward recomputes the
scores (FlashAttention-2, arXiv 2307.08691, section 3.1.2); nothing of size Sq x Sk is ever made.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.kernels.streaming.problem import (
    Answer,
    Gradients,
    Problem,
    Wanted,
    add_mean_gradient,
    fill_empty_rows,
    live_gradient,
    live_lse_gradient,
    row_peak,
    sink_gradient,
)
from attnopt.kernels.streaming.reach import Reach, Span
from attnopt.kernels.streaming.tiling import GPU_TILE, TILE, Tile, tiles


@dataclass(frozen=True, slots=True, eq=False)
class Operands:
    """Inputs in the accumulation dtype: q (B, Hkv, G, Sq, D); k, v (B, Hkv, Sk, .); bias, masks and slopes 5-D."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    masks: tuple[Tensor, ...]
    sinks: Tensor | None
    scale: float
    reach: Reach
    softcap: float | None
    may_leave_rows_empty: bool
    slopes: Tensor | None
    diagonal: int
    symmetric: bool


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What the backward knows of each query: do (B, Hkv, G, Sq, Dv), the rest (B, Hkv, G, Sq)."""

    do: Tensor
    peak: Tensor
    log_sum: Tensor
    empty: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Gradients under construction, in the shapes of `Operands`; delta is what softmax takes off dP, row by row."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    slopes: Tensor | None
    delta: Tensor


def forward(problem: Problem) -> Answer:
    """The attention of `problem`, on any device."""
    x = _operands(problem)
    o = problem.q.new_zeros((*x.q.shape[:-1], x.v.shape[-1]))
    lse, log_sum = _sums_without_keys(x)
    for tile in _tiles(x):
        at = tile.queries
        o[at], lse[at], log_sum[at] = _attend(x, tile)
    o, lse, log_sum = (t.flatten(1, 2) for t in (o, lse, log_sum))
    return Answer(fill_empty_rows(problem, o, lse), lse, log_sum)


def backward(problem: Problem, answer: Answer, do: Tensor, dlse: Tensor | None, wanted: Wanted) -> Gradients:
    """Gradients of q, k, v, the sink logits, and what is `wanted` of bias and slopes, summed to their shapes."""
    x = _operands(problem)
    kv_heads = x.k.shape[1]
    live = live_gradient(problem, answer, do)
    known = (live, row_peak(answer), answer.log_sum, torch.isneginf(answer.lse))
    rows = Rows(*(_grouped(t, kv_heads) for t in known))
    sums = _initial(x, _grouped(live_lse_gradient(answer, dlse), kv_heads), wanted)
    for tile in _tiles(x):
        _accumulate(x, tile, rows, sums)
    return Gradients(
        sums.q.mul_(problem.scale).flatten(1, 2).to(problem.q.dtype),
        sums.k.mul_(problem.scale).to(problem.k.dtype),
        add_mean_gradient(problem, answer, do, sums.v).to(problem.v.dtype),
        None if sums.bias is None else _shaped_like(sums.bias, problem.bias),
        sink_gradient(problem, answer, sums.delta.flatten(1, 2)),
        None if sums.slopes is None else _shaped_like(sums.slopes, problem.slopes),
    )


def _operands(problem: Problem) -> Operands:
    kv_heads, dtype, padding = problem.k.shape[1], problem.accumulate, problem.key_padding
    sinks, slopes = problem.sink_logits, problem.slopes
    return Operands(
        q=_grouped(problem.q.to(dtype).contiguous(), kv_heads),
        k=_without_padding(problem.k.to(dtype), padding).contiguous(),
        v=_without_padding(problem.v.to(dtype), padding).contiguous(),
        bias=None if problem.bias is None else _grouped(problem.bias.to(dtype).contiguous(), kv_heads),
        masks=tuple(_masks(problem)),
        sinks=None if sinks is None else sinks.to(dtype).view(kv_heads, -1, 1),
        scale=problem.scale,
        reach=problem.reach,
        softcap=problem.softcap,
        may_leave_rows_empty=problem.may_leave_rows_empty,
        slopes=None if slopes is None else _grouped(slopes.to(dtype)[..., None, None], kv_heads),
        diagonal=problem.diagonal,
        symmetric=problem.symmetric,
    )


def _initial(x: Operands, dlse: Tensor, wanted: Wanted) -> Sums:
    bias = torch.zeros_like(x.bias) if wanted.bias and x.bias is not None else None
    slopes = torch.zeros_like(x.slopes) if wanted.slopes and x.slopes is not None else None
    return Sums(torch.zeros_like(x.q), torch.zeros_like(x.k), torch.zeros_like(x.v), bias, slopes, -dlse)


def _shaped_like(x: Tensor, like: Tensor | None) -> Tensor | None:
    return None if like is None else x.view(like.shape).to(like.dtype)


def _without_padding(x: Tensor, keep: Tensor | None) -> Tensor:
    """Keys that nobody sees as zeros, so that a NaN left there is not carried along by a weight of zero."""
    return x if keep is None else x.masked_fill(~keep[:, None, :, None], 0.0)


def _masks(problem: Problem) -> Iterator[Tensor]:
    if problem.mask is not None:
        yield _grouped(problem.mask, problem.k.shape[1])
    if problem.key_padding is not None:
        yield problem.key_padding[:, None, None, None, :]


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """(., H, ...) as (., Hkv, G, ...); a head dimension of one, that is broadcast, stays so."""
    return x.unflatten(1, (1, 1) if x.shape[1] == 1 else (kv_heads, -1))


def _sums_without_keys(x: Operands) -> tuple[Tensor, Tensor]:
    """lse and log_sum before any key is seen: -inf and 0, or the learned sink alone."""
    lse = x.q.new_full(x.q.shape[:-1], -torch.inf)
    if x.sinks is not None:
        lse = lse.copy_(x.sinks.expand_as(lse))
    return lse, torch.zeros_like(lse)


def _tiles(x: Operands) -> Iterator[Tile]:
    batch, kv_heads, group = x.q.shape[:3]
    return tiles(batch, kv_heads, group, x.reach, GPU_TILE if x.q.is_cuda else TILE)


def _attend(x: Operands, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """o, lse and log_sum of one tile; in rows that see no key o is zero."""
    scores = _masked(x, tile, _capped(x, _scores(x, tile)))
    peak = scores.amax(-1)
    blind = torch.isneginf(peak)
    weights = torch.softmax(scores, -1)
    log_sum = weights.amax(-1).log_().neg_().masked_fill_(blind, 0.0)
    o = _times(weights, _keys(x.v, tile)).masked_fill_(blind[..., None], 0.0)
    if x.sinks is None:
        return o, peak + log_sum, log_sum
    return _with_sinks(o, peak, log_sum, x.sinks[tile.heads])


def _with_sinks(o: Tensor, peak: Tensor, log_sum: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same after exp(z) has joined the denominators (gpt-oss; FlashAttention's learnable sink)."""
    highest = torch.maximum(peak, z)
    base = highest.masked_fill(torch.isneginf(highest), 0.0)
    keys = torch.exp(peak - base) * torch.exp(log_sum)
    total = keys + torch.exp(z - base)
    log_total = total.log().masked_fill_(torch.isneginf(highest), 0.0)
    return o * (keys / total)[..., None], highest + log_total, log_total


def _scores(x: Operands, tile: Tile) -> Tensor:
    """scale * q k^T of a tile, (b, h, G, rows, columns)."""
    return _times(x.q[tile.queries], _keys(x.k, tile).mT).mul_(x.scale)


def _capped(x: Operands, scores: Tensor) -> Tensor:
    return scores if x.softcap is None else scores.div_(x.softcap).tanh_().mul_(x.softcap)


def _masked(x: Operands, tile: Tile, scores: Tensor) -> Tensor:
    """The logits: bias added, -inf where the key is hidden. In place; only the edges are compared with positions."""
    for section, (keys, inside) in zip(tile.sections, tile.columns, strict=True):
        part = scores[..., inside]
        if x.bias is not None:
            part.add_(_cut(x.bias, tile, keys))
        if x.slopes is not None:
            part.addcmul_(_cut(x.slopes, tile, keys), _distance(x, tile, section))
        for mask in x.masks:
            part.masked_fill_(~_cut(mask, tile, keys), -torch.inf)
        for start, stop in x.reach.edges(tile.rows, section):
            seen = x.reach.tile(tile.rows, (start, stop), scores.device)
            part[..., start - section[0] : stop - section[0]].masked_fill_(~seen, -torch.inf)
    return scores


def _distance(x: Operands, tile: Tile, section: Span) -> Tensor:
    """What the slopes multiply, (rows, columns): a difference of whole numbers, so that nothing is lost far away."""
    i, j = (torch.arange(*span, device=x.q.device) for span in (tile.rows, section))
    away = j - (i + x.diagonal)[:, None]
    return (-away.abs() if x.symmetric else away).to(x.q.dtype)


def _cut(x: Tensor, tile: Tile, keys: slice) -> Tensor:
    """The tile's part of a tensor that broadcasts to (B, Hkv, G, Sq, Sk), itself still to be broadcast."""
    index = (*tile.queries, keys)
    return x[tuple(at if size > 1 else slice(None) for at, size in zip(index, x.shape, strict=True))]


def _keys(x: Tensor, tile: Tile) -> Tensor:
    """The rows of k or v that the tile sees, (b, h, columns, .)."""
    part = x[tile.batch, tile.heads]
    sections = [part[:, :, keys] for keys, _ in tile.columns]
    return sections[0] if len(sections) == 1 else torch.cat(sections, dim=2)


def _times(x: Tensor, y: Tensor) -> Tensor:
    """x (b, h, G, n, m) @ y (b, h, m, l): the G query heads of a kv head are rows of one product."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def _outer(x: Tensor, y: Tensor) -> Tensor:
    """x^T y summed over the queries of the group: (b, h, G, n, m), (b, h, G, n, l) -> (b, h, m, l)."""
    return x.flatten(2, 3).mT @ y.flatten(2, 3)


def _accumulate(x: Operands, tile: Tile, rows: Rows, sums: Sums) -> None:
    """Adds one tile's part of every gradient."""
    at = tile.queries
    raw = _capped(x, _scores(x, tile))
    slope = None if x.softcap is None else 1 - (raw / x.softcap).square_()
    weights = _weights(x, tile, rows, _masked(x, tile, raw))
    _add_keys(sums.v, tile, _outer(weights, rows.do[at]))
    dscores = _times(rows.do[at], _keys(x.v, tile).mT).mul_(weights)
    sums.delta[at] += dscores.sum(-1)
    dscores.addcmul_(weights, sums.delta[at][..., None], value=-1.0)
    if sums.bias is not None:
        _add_bias(sums.bias, tile, dscores)
    if sums.slopes is not None:
        _add_slopes(sums.slopes, x, tile, dscores)
    if slope is not None:
        dscores.mul_(slope)
    sums.q[at] = _times(dscores, _keys(x.k, tile))
    _add_keys(sums.k, tile, _outer(dscores, x.q[at]))


def _weights(x: Operands, tile: Tile, rows: Rows, logits: Tensor) -> Tensor:
    """The softmax again; with sinks from what was saved, as their part of the sum is not among the logits."""
    at = tile.queries
    if x.sinks is not None:
        return logits.sub_(rows.peak[at][..., None]).sub_(rows.log_sum[at][..., None]).exp_()
    weights = torch.softmax(logits, -1)
    return weights.masked_fill_(rows.empty[at][..., None], 0.0) if x.may_leave_rows_empty else weights


def _add_keys(total: Tensor, tile: Tile, part: Tensor) -> None:
    for keys, inside in tile.columns:
        total[tile.batch, tile.heads, keys] += part[:, :, inside]


def _add_bias(total: Tensor, tile: Tile, dscores: Tensor) -> None:
    for keys, inside in tile.columns:
        place = _cut(total, tile, keys)
        place += dscores[..., inside].sum_to_size(place.shape)


def _add_slopes(total: Tensor, x: Operands, tile: Tile, dscores: Tensor) -> None:
    for section, (keys, inside) in zip(tile.sections, tile.columns, strict=True):
        place = _cut(total, tile, keys)
        place += (dscores[..., inside] * _distance(x, tile, section)).sum_to_size(place.shape)
