"""Decay as the sweep kernel reads it: one number per head, or running sums per token inside each chunk."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels._triton import offset
from attnopt.kernels.lightning.blocks import LEAST_LOG_DECAY, LOG2E, log2_decay

_LEAST = tl.constexpr(LEAST_LOG_DECAY)
_LOG2E = tl.constexpr(LOG2E)


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


def prepare_decay(log_decay: Tensor | None, chunk: int) -> Decay:
    """`log_decay` None, (H,) or (B, H, S), as the kernel reads it."""
    if log_decay is None or log_decay.dim() == 1:
        return Decay(chunk, log_decay)
    rest = -log_decay.shape[-1] % chunk
    steps = torch.nn.functional.pad(log2_decay(log_decay), (0, rest))
    run = steps.unflatten(-1, (-1, chunk)).cumsum(-1).flatten(-2)
    high = run.float()
    return Decay(chunk, high, (run - high).float())


@triton.jit
def head_decay(high_ptr, stride, h, PER_TOKEN: tl.constexpr):
    """The log decay of a head to base 2; 0 where there is none, or one per token."""
    g = 0.0
    if high_ptr is not None and not PER_TOKEN:
        g = tl.load(high_ptr + h * stride).to(tl.float32)
        g = tl.maximum(g, _LEAST, propagate_nan=tl.PropagateNan.ALL) * _LOG2E
    return g


@triton.jit
def running_decay(
    high_ptr, low_ptr, stride, bh, chunk, position, PER_TOKEN: tl.constexpr, CHUNK: tl.constexpr
):
    """The two parts of the running log decay at `position` in the chunk; zeros when decay is per head."""
    high = tl.zeros_like(position).to(tl.float32)
    low = high
    if PER_TOKEN:
        at = offset(bh, stride) + chunk * CHUNK + position
        high = tl.load(high_ptr + at)
        low = tl.load(low_ptr + at)
    return high, low


@triton.jit
def pair_weights(
    position, g, high, low, PER_TOKEN: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr
):
    """2^(log decay from b to a) for key b (rows) and query a (columns); 0 where b is later, in reverse earlier.

    The exponent is masked before exp2: it would overflow there.
    """
    b = position[:, None]
    a = position[None, :]
    if PER_TOKEN:
        exponent = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
        exponent = -exponent if REVERSE else exponent
    else:
        exponent = g * tl.abs(a - b)
    keep = a <= b if REVERSE else a >= b
    if STRICT:
        keep = keep & (a != b)
    return tl.exp2(tl.where(keep, exponent, float("-inf")))
