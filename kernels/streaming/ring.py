"""One decoding step over a ring of keys: the first keys stay, the others overwrite the oldest; in torch, or Triton.

A slot knows its position by arithmetic: slot c < sinks holds position c for good; slot c >= sinks holds the newest
position that is congruent to c modulo the length of the ring. So nothing is stored beside keys and values, the order
inside the ring is irrelevant, and lengths are read where they lie, on the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.kernels.streaming.checks import WIDEST


@dataclass(frozen=True, slots=True)
class Span:
    """How much is kept and seen: the first `sinks` positions, and of the others the last `window`, the query's own
    included; the ring holds `spare` positions more, so that as many newest ones can be taken back.
    """

    sinks: int
    window: int
    spare: int = 0

    @property
    def ring(self) -> int:
        """Slots of the ring."""
        return self.window + self.spare

    @property
    def slots(self) -> int:
        """Slots in all."""
        return self.sinks + self.ring

    @property
    def last_place(self) -> int:
        """The place of the query among what it sees, once keys have been dropped: L - 1 in arXiv 2309.17453."""
        return self.sinks + self.window - 1

    def place(self, t: Tensor) -> Tensor:
        """The place of the query at position `t` among what it sees: min(t, L - 1). Sinks are scored from there."""
        return t.clamp(max=self.last_place)

    def slot(self, t: Tensor) -> Tensor:
        """The slot of position `t`; for a negative one, some slot."""
        in_ring = self.sinks + (t - self.sinks) % self.ring
        return torch.where((t >= 0) & (t < self.sinks), t, in_ring)

    def held(self, newest: Tensor) -> Tensor:
        """The position in each slot, (B, slots), when the newest one is `newest` (B,); a negative one is none."""
        slot = torch.arange(self.slots, device=newest.device)
        recent = newest[:, None] - (newest[:, None] - slot) % self.ring
        recent = recent.masked_fill(recent < self.sinks, -1)
        return torch.where(slot < self.sinks, slot, recent)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """One query to a sequence, whose own key is in the ring already.

    near, far (B, H, D): the query as the window's keys and as the sinks are scored with (one tensor where positions
    are not rotated). keys (B, Hkv, slots, D), values (B, Hkv, slots, Dv), any strides; query head h reads kv head
    h // (H / Hkv). newest (B,) int64: the query's position, -1 where the sequence has no query, whose row is zero.
    slopes: float (H,), times the distance, taken off the score (ALiBi); to a sink the distance is that of places.

    What a launch may use, or leave to others: tickets int32 (B * Hkv,), zeros and left as zeros, by which parts of the
    ring know the last of them, which joins them; seen (B,) int64, which becomes newest + 1 where there is a query.
    """

    near: Tensor
    far: Tensor
    keys: Tensor
    values: Tensor
    newest: Tensor
    span: Span
    scale: float
    slopes: Tensor | None = None
    tickets: Tensor | None = None
    seen: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One new token to a sequence, before it is in the ring.

    q (B, H, D), k (B, Hkv, D), v (B, Hkv, Dv), any strides. keys, values: the ring, written in place. seen (B,)
    int64: the token's position, only read. keep: bool (B,), False where there is no token, so nothing is written.
    frequencies: fp64 (R / 2,) on the device, radians a position, or None: no rotation. Pairs of features are
    neighbours, or lie in the two halves of the first R. gain multiplies what is turned. turned: q and k come turned
    to their position already, and only the query to the sinks is to be turned on.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    seen: Tensor
    keep: Tensor | None
    span: Span
    frequencies: Tensor | None = None
    neighbours: bool = False
    gain: float = 1.0
    turned: bool = False


def enters_by_triton(q: Tensor) -> bool:
    """Whether one launch can take in what belongs to the query `q`."""
    return q.is_cuda and q.dtype != torch.float64 and q.numel() > 0


def take(entry: Entry, scale: float, slopes: Tensor | None) -> Tensor:
    """(B, H, Dv): a token to each sequence enters the ring and attends; `seen` is counted on.

    For `enters_by_triton` only.
    """
    from attnopt.kernels.streaming.triton_enter import launch

    near, far, newest, tickets = launch(entry)
    at = entry.keys, entry.values, newest, entry.span, scale, slopes
    return decode(Step(near, far, *at, tickets=tickets, seen=entry.seen))


def decode(step: Step) -> Tensor:
    """(B, H, Dv) in the dtype of the query. On a GPU a Triton kernel that can be captured in a CUDA graph."""
    if not _served_by_triton(step):
        if step.seen is not None:
            step.seen.copy_(torch.where(step.newest < 0, step.seen, step.newest + 1))
        return decode_in_torch(step)
    from attnopt.kernels.streaming.triton_decode import launch

    return launch(step)


def _served_by_triton(step: Step) -> bool:
    narrow = max(step.keys.shape[3], step.values.shape[3]) <= WIDEST
    return step.near.is_cuda and step.near.dtype != torch.float64 and narrow and step.near.numel() > 0


def decode_in_torch(step: Step) -> Tensor:
    """The definition: every slot scored, sinks with `far`, the window with `near`; softmax in fp32, or fp64."""
    span, newest = step.span, step.newest
    dtype = torch.float64 if step.near.dtype == torch.float64 else torch.float32
    kv_heads = step.keys.shape[1]
    near, far = (x.to(dtype).unflatten(1, (kv_heads, -1)) for x in (step.near, step.far))
    keys, values = step.keys.to(dtype), step.values.to(dtype)
    held = span.held(newest)
    seen = (held >= 0) & (held <= newest[:, None])
    seen[:, span.sinks :] &= held[:, span.sinks :] > newest[:, None] - span.window
    first, recent = keys[:, :, : span.sinks], keys[:, :, span.sinks :]
    scores = torch.cat([far @ first.mT, near @ recent.mT], dim=3) * step.scale
    if step.slopes is not None:
        away = _distance(span, newest, held).to(dtype)
        scores -= step.slopes.to(dtype).view(kv_heads, -1, 1) * away[:, None, None]
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    weights = torch.softmax(scores, -1).masked_fill(~seen.any(1)[:, None, None, None], 0.0)
    if values.is_cuda or not bool(seen.all()):
        # What was left behind in a slot that nobody sees may be NaN, which a weight of zero would carry along.
        values = values.masked_fill(~seen[:, None, :, None], 0.0)
    return (weights @ values).flatten(1, 2).to(step.near.dtype)


def _distance(span: Span, newest: Tensor, held: Tensor) -> Tensor:
    """How far the key in each slot lies behind the query, (B, slots): sinks by places, the window by positions."""
    place = span.place(newest)[:, None]
    return torch.cat([place - held[:, : span.sinks], newest[:, None] - held[:, span.sinks :]], dim=1)
