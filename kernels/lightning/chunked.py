"""Linear attention with scalar decay in plain torch, chunk by chunk: O(N) time, and only a block of temporaries.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

Lightning Attention-2 (arXiv 2401.04658), Algorithms 1 and 2, with the state carried un-decayed and ragged chunks exact:
a chunk of m rows decays the state by its own m steps, never by the tile's length. Sums are kept in fp32 (fp64 for
fp64 inputs). A block is a few chunks whose products run as one batch; the state is the only thing that passes
between chunks.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from attnopt.kernels.lightning.blocks import Block, Factors, decays, log2_decay, split
from attnopt.kernels.lightning.shapes import Gradients, repeat_heads, starting_state, state_dtype, sum_groups

#: Rows of a chunk. Of 16 to 256, measured on CPU cores (H 8, D 64; H 16, D 128; fp32), 32 takes 0.85 to 1 times as
#: long, but rounds the state twice as often, which shows over 10,000 tokens; the others are slower.
CHUNK = 64


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention and the state after the last token.

    q (B, H, S, D), k (B, Hkv, S, D), v (B, Hkv, S, Dv), log_decay None, (H,) or (B, H, S), initial_state None or
    (B, H, D, Dv) -> o (B, H, S, Dv) in q's dtype, state (B, H, D, Dv) in `state_dtype`.
    """
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    state = starting_state(q, v, initial_state)
    blocks = split(q.shape[2], chunk, q.shape[0] * q.shape[1])
    for block, factors in zip(blocks, decays(log_decay, blocks, state, scale), strict=True):
        query, key, value = (_cut(x, block, q.shape[1]) for x in (q, k, v))
        deltas = _times(key, factors.until).mT @ value
        entering, state = _scan(deltas, factors.total, state, range(block.count))
        o = _weighted(query, key, factors) @ value
        out[:, :, block.rows] = _add_product(o, _times(query, factors.since), entering).flatten(2, 3)
    return out, state


def backward(
    d_out: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    *,
    with_log_decay: bool = False,
    chunk: int = CHUNK,
) -> Gradients:
    """Gradients of `forward`, by the same chunks: states forward, then everything in one sweep backward.

    d_out (B, H, S, Dv), d_state None or (B, H, D, Dv); each gradient has the shape and dtype of its tensor.
    """
    blocks = split(q.shape[2], chunk, q.shape[0] * q.shape[1])
    state = starting_state(q, v, initial_state)
    factors = decays(log_decay, blocks, state, scale)
    checkpoints = _checkpoints(k, v, state, blocks, factors)
    grads = _empty_gradients(q, k, v, starting_state(q, v, d_state), with_log_decay=with_log_decay)
    arriving = grads.initial_state
    for block, factor, entering in zip(
        reversed(blocks), reversed(factors), reversed(checkpoints), strict=True
    ):
        tiles = tuple(_cut(x, block, q.shape[1]) for x in (q, k, v, d_out))
        arriving = _block_backward(tiles, factor, entering, arriving, block, grads)
    grads.initial_state.copy_(arriving)
    return grads


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
    """One token: updates `state` (B, H, D, Dv) in place, returns o (B, H, Dv).

    q (B, H, D), k (B, Hkv, D), v (B, Hkv, Dv), log_decay None, (H,) or (B, H).
    """
    query, key, value = (repeat_heads(x, q.shape[1]).to(state.dtype) for x in (q, k, v))
    if log_decay is not None:
        state *= log2_decay(log_decay).exp2().to(state.dtype)[..., None, None]
    state += key[..., :, None] * value[..., None, :]
    return ((query * scale)[..., None, :] @ state)[..., 0, :].to(q.dtype)


def _weighted(rows: Tensor, columns: Tensor, factors: Factors) -> Tensor:
    """The products of all pairs in a chunk, decayed; 0 for later columns, be they infinite."""
    return (rows @ columns.mT).tril_().mul_(factors.pairs)


def _scan(deltas: Tensor, total: Tensor | None, state: Tensor, order: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What enters each chunk, and what leaves the last: state <- total * state + delta, chunk by chunk in `order`."""
    entering = torch.empty_like(deltas)
    places = [*entering.unbind(2), torch.empty_like(state)]
    places[order[0]].copy_(state)
    for i, following in pairwise([*order, len(order)]):
        factor = None if total is None else total[:, :, i % total.shape[2]]
        _advance(places[i], deltas[:, :, i], factor, places[following])
    return entering, places[-1]


def _advance(state: Tensor, delta: Tensor, factor: Tensor | None, into: Tensor) -> None:
    """into = factor * state + delta, in one pass."""
    if factor is None:
        torch.add(state, delta, out=into)
    else:
        torch.addcmul(delta, state, factor, out=into)


def _checkpoints(
    k: Tensor, v: Tensor, state: Tensor, blocks: Sequence[Block], factors: Sequence[Factors]
) -> list[Tensor]:
    """The state that enters each block."""
    entering = []
    for block, factor in zip(blocks, factors, strict=True):
        entering.append(state)
        key, value = (_cut(x, block, state.shape[1]) for x in (k, v))
        _, state = _scan(_times(key, factor.until).mT @ value, factor.total, state, range(block.count))
    return entering


def _block_backward(
    tiles: tuple[Tensor, ...],
    f: Factors,
    entering: Tensor,
    arriving: Tensor,
    block: Block,
    grads: Gradients,
) -> Tensor:
    """Writes the block's rows of all gradients; returns the gradient at the state that enters the block."""
    q, k, v, d_o = tiles
    weighted = _times(k, f.until)
    states, _ = _scan(weighted.mT @ v, f.total, entering, range(block.count))
    outer, before = _scan(_times(q, f.since).mT @ d_o, f.total, arriving, range(block.count)[::-1])
    d_scores = _weighted(d_o, v, f)
    dq = _add_product(d_scores @ k, _times(d_o, f.since), states.mT)
    dk = _add_product(d_scores.mT @ q, _times(v, f.until), outer.mT)
    dv = _add_product(_weighted(q, k, f).mT @ d_o, weighted, outer)
    grads.q[:, :, block.rows] = dq.flatten(2, 3)
    grads.k[:, :, block.rows] = sum_groups(dk.flatten(2, 3), grads.k.shape[1])
    grads.v[:, :, block.rows] = sum_groups(dv.flatten(2, 3), grads.v.shape[1])
    if grads.log_decay.numel():
        pairs = d_scores * (q @ k.mT)
        since = (_times(q, f.since) * (d_o @ states.mT)).sum(-1)
        until = (weighted * (v @ outer.mT)).sum(-1)
        through = _times((states * outer).sum((-2, -1), keepdim=True), f.total)[..., 0]
        grads.log_decay[:, :, block.rows] = _step_gradient(pairs, since, until, through).flatten(2, 3)
    return before


def _step_gradient(pairs: Tensor, since: Tensor, until: Tensor, through: Tensor) -> Tensor:
    """d log_decay (B, H, count, C): for step t, all that passes from before t to t or later.

    pairs (C, C): row a's share of the loss that comes from key b; since: what the entering state gives to row a; until:
    what key b gives to the leaving state; through: what passes the whole chunk. Sums only, so that nothing cancels.
    """
    later = torch.ones_like(pairs[0, 0, 0]).tril_()
    earlier = later.mT - torch.eye(len(later), dtype=later.dtype, device=later.device)
    return (pairs @ earlier).tril_().sum(-2) + since @ later + until @ earlier + through


def _empty_gradients(q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, with_log_decay: bool) -> Gradients:
    rows = state.new_empty(q.shape[:3] if with_log_decay else 0)
    return Gradients(q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), rows, state)


def _cut(x: Tensor, block: Block, heads: int) -> Tensor:
    """The block's rows as (B, H, count, C, D), contiguous, in the dtype of sums."""
    rows = x[:, :, block.rows].unflatten(2, (block.count, block.chunk))
    return repeat_heads(rows.to(state_dtype(x.dtype)), heads).contiguous()


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _add_product(to: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """to += a @ b, all (B, H, count, ., .)."""
    to.flatten(0, 2).baddbmm_(a.flatten(0, 2), b.flatten(0, 2))
    return to
