"""How the torch path cuts a sequence into blocks of chunks, and the decay factors inside them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

#: Chunk matrices handled as one batch, over all heads: enough to fill the cores, few enough to stay in cache.
MATRICES = 64

#: Decay is applied as 2^x, exact for powers of two, with x = log_decay * LOG2E.
LOG2E = math.log2(math.e)

#: exp of this is zero in every dtype, so a lower log decay (-inf too) means the same and stays clear of inf - inf.
LEAST_LOG_DECAY = -1000.0


@dataclass(frozen=True, slots=True)
class Block:
    """Rows [start, start + count * chunk) of the sequence: `count` chunks of equal length."""

    start: int
    count: int
    chunk: int

    @property
    def rows(self) -> slice:
        """The block's rows in the sequence."""
        return slice(self.start, self.start + self.count * self.chunk)


@dataclass(frozen=True, slots=True)
class Factors:
    """Decay within the chunks of a block, broadcastable to (B, H, count, rows, columns). None stands for 1.

    G is the running sum of log decay in the chunk. What is read by queries holds the scale too, so that no tensor
    needs to be multiplied by it.
    """

    pairs: Tensor  # (C, C): scale * exp(G_a - G_b) where a >= b, else 0
    since: Tensor | None  # (C, 1): scale * exp(G_a), from the state entering the chunk to row a
    until: Tensor | None  # (C, 1): exp(G_C - G_a), from row a to the state leaving the chunk
    total: Tensor | None  # (1, 1): exp(G_C)


def log2_decay(log_decay: Tensor) -> Tensor:
    """The decay's exponent to base 2, in fp64."""
    return log_decay.double().clamp(min=LEAST_LOG_DECAY) * LOG2E


def split(length: int, chunk: int, heads: int) -> list[Block]:
    """The sequence as blocks of whole chunks, and one last block for the ragged rest."""
    count = max(1, MATRICES // max(1, heads))
    whole = length // chunk
    blocks = [Block(i * chunk, min(count, whole - i), chunk) for i in range(0, whole, count)]
    rest = length - whole * chunk
    return [*blocks, Block(whole * chunk, 1, rest)] if rest else blocks


def decays(log_decay: Tensor | None, blocks: Sequence[Block], like: Tensor, scale: float) -> list[Factors]:
    """The factors of each block, in the dtype and on the device of `like`; equal ones are shared."""
    if log_decay is not None and log_decay.dim() == 3:
        cut = (log_decay[:, :, b.rows].unflatten(2, (b.count, b.chunk)) for b in blocks)
        return [_token_factors(rows, like, scale) for rows in cut]
    make = _plain_factors if log_decay is None else partial(_head_factors, log_decay)
    shared = {chunk: make(chunk, like, scale) for chunk in {b.chunk for b in blocks}}
    return [shared[b.chunk] for b in blocks]


def _plain_factors(chunk: int, like: Tensor, scale: float) -> Factors:
    """No decay at all."""
    since = None if scale == 1.0 else like.new_full((1, 1), scale)
    return Factors(like.new_full((chunk, chunk), scale).tril_(), since, None, None)


def _head_factors(log_decay: Tensor, chunk: int, like: Tensor, scale: float) -> Factors:
    """A fixed decay per head, log_decay (H,): exponents are g times a distance, so nothing cancels."""
    g = log2_decay(log_decay).to(like.dtype).view(1, -1, 1, 1, 1)
    age = torch.arange(1, chunk + 1, device=like.device, dtype=like.dtype)[:, None]
    return Factors(
        _pairs(g * (age - age.mT)) * scale,
        (g * age).exp2() * scale,
        (g * (chunk - age)).exp2(),
        (g * chunk).exp2(),
    )


def _token_factors(log_decay: Tensor, like: Tensor, scale: float) -> Factors:
    """A decay per token, log_decay (B, H, count, C): running sums in fp64, for their differences are small."""
    run = log2_decay(log_decay).cumsum(-1)[..., None]
    last = run[..., -1:, :]
    return Factors(
        _pairs((run - run.mT).to(like.dtype)) * scale,
        run.exp2().to(like.dtype) * scale,
        (last - run).exp2().to(like.dtype),
        last.exp2().to(like.dtype),
    )


def _pairs(exponent: Tensor) -> Tensor:
    """2^exponent on and below the diagonal, 0 above; masked before, for it would overflow there."""
    future = torch.ones(exponent.shape[-2:], dtype=torch.bool, device=exponent.device).triu(1)
    return exponent.masked_fill(future, -torch.inf).exp2()
