"""Decay as the sweep kernel reads it, one number per head or running sums per token inside each chunk; its gradient.

d log_decay of step t is the sum of what passes from any key before t to any query from t on. With w(a, b) for query
a's share of the loss that comes from key b, it has four parts, none of which is a difference of sums:

    crossing  w(a, b) of pairs b < t <= a in t's own chunk
    since     w(a, b) of a >= t in t's chunk and b in chunks before it: q_a . (what dq_a has from the entering state)
    until     the same for b < t in t's chunk and a in chunks after it: k_b . (what dk_b has from the leaving state)
    through   all pairs with t's whole chunk between them: <entering state, gradient of the leaving state> x decay
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels.lightning.blocks import LEAST_LOG_DECAY, LOG2E, log2_decay

_LEAST = tl.constexpr(LEAST_LOG_DECAY)
_LOG2E = tl.constexpr(LOG2E)
_LN2 = tl.constexpr(1 / LOG2E)


@dataclass(frozen=True, slots=True)
class Decay:
    """Log decay as the kernel reads it, with chunks of `chunk` rows.

    Per head: `high` is log_decay (H,), or None for no decay. Per token: `high + low` (B, H, whole chunks) fp32 is its
    running sum inside each chunk, to base 2, in two parts so that differences of long sums keep their digits.
    """

    chunk: int
    high: Tensor | None = None
    low: Tensor | None = None

    @property
    def stride(self) -> int:
        """Elements from one head to the next."""
        if self.high is None:
            return 0
        return self.high.stride(0) if self.low is None else self.high.shape[-1]


def prepare_decay(log_decay: Tensor | None, chunk: int, starts: Tensor | None = None) -> Decay:
    """`log_decay` None, (H,) or (B, H, S), as the kernel reads it; `starts`: of packed sequences, (n + 1,), B = 1."""
    if log_decay is None or log_decay.dim() == 1:
        return Decay(chunk, log_decay)
    steps = log2_decay(log_decay)
    run = _running(steps, chunk) if starts is None else _running_packed(steps, chunk, starts)
    high = run.float()
    return Decay(chunk, high, (run - high).float())


def _running(steps: Tensor, chunk: int) -> Tensor:
    padded = torch.nn.functional.pad(steps, (0, -steps.shape[-1] % chunk))
    return padded.unflatten(-1, (-1, chunk)).cumsum(-1).flatten(-2)


def _running_packed(steps: Tensor, chunk: int, starts: Tensor) -> Tensor:
    """Sums from the start of the row's chunk, counted from the start of its sequence; padded by one chunk."""
    rows = torch.arange(steps.shape[-1], device=steps.device)
    start = starts[torch.searchsorted(starts[1:], rows, right=True).clamp_max(len(starts) - 2)]
    total = torch.nn.functional.pad(steps.cumsum(-1), (1, 0))
    run = total[..., 1:] - total[..., rows - (rows - start) % chunk]
    return torch.nn.functional.pad(run, (0, chunk))


@dataclass(frozen=True, slots=True)
class DecayTerms:
    """What the sweeps leave for d log_decay: `rows` (2, slices of D, B, H, S) fp32, to be added up.

    states (B, H, chunks, D, Dv): what enters each chunk, in the inputs' dtype, or fp32 where that lacks the range.
    """

    rows: Tensor
    states: Tensor


def empty_terms(q: Tensor, v: Tensor, slices: int, chunk: int, packed: int = 0) -> DecayTerms:
    """Room for the terms of q (B, H, S, D) and v (B, Hkv, S, Dv), `packed` sequences one behind the other."""
    batch, heads, length, d = q.shape
    rows = q.new_empty((2, slices, batch, heads, length), dtype=torch.float32)
    kept = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    chunks = length // chunk + packed if packed else triton.cdiv(length, chunk)
    return DecayTerms(rows, q.new_empty((batch, heads, chunks, d, v.shape[3]), dtype=kept))


@triton.jit
def decay_factor(exponent, dtype: tl.constexpr):
    """2^exponent, for fp32 operands also below 2^-126, where exp2 on a GPU returns 0 and fp32 still has numbers.

    What is as large as 2^120 fades to something in there. A product of normal numbers is not flushed.
    """
    if dtype == tl.float32:
        low = exponent < -64.0
        factor = tl.exp2(tl.where(low, exponent + 64.0, exponent)) * tl.where(low, 2.0**-64, 1.0)
    else:
        factor = tl.exp2(exponent)
    return factor


@triton.jit
def head_decay(high_ptr, stride, h, PER_TOKEN: tl.constexpr):
    """The log decay of a head to base 2; 0 where there is none, or one per token."""
    g = 0.0
    if high_ptr is not None and not PER_TOKEN:
        g = tl.load(high_ptr + h * stride).to(tl.float32)
        g = tl.maximum(g, _LEAST, propagate_nan=tl.PropagateNan.ALL) * _LOG2E
    return g


@triton.jit
def rest_of_factor(total, factor):
    """2^total - factor, what rounding took from a factor near 1; 0 further away, where it fades before it adds up."""
    x = total * _LN2
    series = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x / 120))))
    return tl.where(tl.abs(x) < 0.05, series - (factor - 1), 0.0)


@triton.jit
def running_decay(high_ptr, low_ptr, before, position, PER_TOKEN: tl.constexpr):
    """The two parts of the running log decay `position` rows after `before`; zeros when decay is per head."""
    high = tl.zeros_like(position).to(tl.float32)
    low = high
    if PER_TOKEN:
        high = tl.load(high_ptr + before + position)
        low = tl.load(low_ptr + before + position)
    return high, low


@triton.jit
def weighted_pairs(
    scores, position, g, high, low, scale, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr, dtype: tl.constexpr
):  # fmt: skip
    """scores times scale * 2^(log decay from b to a), for key b (rows) and query a (columns).

    0 where b is later, in reverse earlier, whatever the score is there: infinite keys reach no earlier query.
    """
    b = position[:, None]
    a = position[None, :]
    keep = a <= b if REVERSE else a >= b
    if PER_TOKEN:
        exponent = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
        exponent = tl.where(
            keep, -exponent if REVERSE else exponent, float("-inf")
        )  # it may overflow elsewhere
    else:
        exponent = g * tl.abs(a - b)
    return tl.where(keep, scores * (decay_factor(exponent, dtype) * scale), 0.0)


@triton.jit
def forward_terms(since, shares, position):
    """d log_decay of each step, of what comes from keys before it in its chunk, and from chunks before that.

    since (rows,): by query, what comes from chunks before. shares (keys, queries): what comes from each key.
    """
    later = tl.cumsum(shares, axis=1, reverse=True)
    crossing = tl.sum(tl.where(position[:, None] < position[None, :], later, 0.0), axis=0)
    return crossing + tl.cumsum(since, axis=0, reverse=True)


@triton.jit
def reverse_terms(until, through, position):
    """The rest: what goes from keys before the step in its chunk to chunks after, and what passes the whole chunk."""
    before = tl.where(position[:, None] < position[None, :], until[:, None], 0.0)
    return tl.sum(before, axis=0) + through
