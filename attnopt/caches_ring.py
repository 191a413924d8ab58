"""One layer of a stream: keys and values of the first positions and of the last ones, written once, never moved."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnopt.caches_rotary import Rotary
from attnopt.errors import OptionError, ShapeError, UnsupportedError
from attnopt.kernels.streaming.op import attend
from attnopt.kernels.streaming.ring import Entry, Span, Step, decode, enters_by_triton, take

#: The tensors of a ring, all with the batch as their first dimension.
FIELDS = ("keys", "values", "seen", "top")

#: Tokens of a prompt that are taken in at once.
PIECE = 16_384


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """New tokens of one layer: q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv).

    keep: bool (B, N), False where there is no token (padding on any side); None: all are there. rotary: how positions
    turn queries and keys, or None; turned: they come turned to their position already. slopes: float (H,), ALiBi.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor | None
    scale: float
    slopes: Tensor | None = None
    rotary: Rotary | None = None
    turned: bool = False

    def pieces(self, most: int) -> list["Arrival"]:
        """The same tokens, at most `most` at a time."""
        if self.q.shape[2] <= most:
            return [self]
        return [self._part(slice(start, start + most)) for start in range(0, self.q.shape[2], most)]

    def _part(self, at: slice) -> "Arrival":
        q, k, v = (x[:, :, at] for x in (self.q, self.k, self.v))
        return replace(self, q=q, k=k, v=v, keep=None if self.keep is None else self.keep[:, at])

    def placed(self, t: Tensor, span: Span) -> "Tokens":
        """With the queries and keys that positions t (B, N) make of them."""
        near, far, k = self.q, self.q, self.k
        if self.rotary is not None and not self.turned:
            near, k = self.rotary.turned(self.q, t), self.rotary.turned(self.k, t)
        if self.rotary is not None and span.sinks:
            place = span.place(t)
            far = self.rotary.moved(near, place - t) if self.turned else self.rotary.turned(self.q, place)
        return Tokens(near, far, k, self.v, self.keep, self.scale, self.slopes)


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """The same after their positions were applied: near, far (B, H, N, D) score the window's keys, and the sinks."""

    near: Tensor
    far: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor | None
    scale: float
    slopes: Tensor | None = None


class Ring:
    """Keys (B, Hkv, slots, D) and values (B, Hkv, slots, Dv) of the positions that `span` keeps; all memory at once.

    seen (B,) int64: tokens taken in so far, which is the position of the next one. top (B,): the most that `seen` was
    before a crop, by which it is known what another one can bring back.
    """

    def __init__(self, span: Span, k: Tensor, v: Tensor) -> None:
        self.span = span
        batch, heads = k.shape[:2]
        self.keys = k.new_zeros(batch, heads, span.slots, k.shape[3])
        self.values = v.new_zeros(batch, heads, span.slots, v.shape[3])
        self.seen = torch.zeros(batch, dtype=torch.int64, device=k.device)
        self.top = torch.zeros_like(self.seen)

    def positions(self, length: int, keep: Tensor | None) -> Tensor:
        """(B, N): where the next `length` tokens stand; padding has the position of the token before it."""
        if keep is None:
            return self.seen[:, None] + torch.arange(length, device=self.seen.device)
        return self.seen[:, None] + keep.cumsum(1) - 1

    def check(self, k: Tensor, v: Tensor) -> None:
        """Raises ShapeError unless the new keys and values belong to what is here."""
        kept = (
            self.keys.shape[:2],
            self.keys.shape[3],
            self.values.shape[3],
            self.keys.dtype,
            self.keys.device,
        )
        found = (k.shape[:2], k.shape[3], v.shape[3], k.dtype, k.device)
        if kept != found:
            raise ShapeError(
                f"new keys and values are (B, Hkv), D, Dv, dtype, device = {found}, the cache holds {kept}; "
                "wanted the same, or another cache"
            )

    @torch.no_grad()
    def attend(self, new: Arrival) -> Tensor:
        """(B, H, N, Dv): what the new tokens attend to, after they were taken in, each seeing what it would see alone.

        One token to each sequence is one decoding step, without waiting for the device. Padding returns zeros.
        """
        self.check(new.k, new.v)
        if new.rotary is not None:
            new.rotary.check(new.q.shape[3])
        if new.q.shape[2] == 1 and enters_by_triton(new.q):
            return self._enter(new)
        # Pieces bound the memory of a long prompt; each repeats a window of work at most.
        taken = [self._take(piece) for piece in new.pieces(max(PIECE, 4 * self.span.window))]
        return taken[0] if len(taken) == 1 else torch.cat(taken, dim=2)

    def _enter(self, new: Arrival) -> Tensor:
        """One step in as few launches as there can be."""
        keep = None if new.keep is None else new.keep[:, 0]
        turn: dict[str, Any] = {"turned": new.turned}
        if new.rotary is not None:
            turn["frequencies"] = new.rotary.on(new.q.device).frequencies
            turn |= {"neighbours": new.rotary.pairs == "neighbours", "gain": new.rotary.gain}
        q, k, v = (x[:, :, 0] for x in (new.q, new.k, new.v))
        entry = Entry(q, k, v, self.keys, self.values, self.seen, keep, self.span, **turn)
        return take(entry, new.scale, new.slopes)[:, :, None]

    def _take(self, new: Arrival) -> Tensor:
        length = new.q.shape[2]
        if not length:
            return new.q.new_zeros(*new.q.shape[:3], new.v.shape[3])
        placed = new.placed(self.positions(length, new.keep), self.span)
        return self._step(placed) if length == 1 else self._chunk(placed)

    def _step(self, new: Tokens) -> Tensor:
        """Writes one key to each sequence, in its slot, then attends."""
        here = self.seen.clone() if new.keep is None else torch.where(new.keep[:, 0], self.seen, -1)
        rows, slot = torch.arange(here.shape[0], device=here.device), self.span.slot(self.seen)
        for kept, fresh in ((self.keys, new.k[:, :, 0]), (self.values, new.v[:, :, 0])):
            old = fresh if new.keep is None else kept[rows, :, slot]
            kept[rows, :, slot] = fresh if new.keep is None else torch.where(new.keep[:, :, None], fresh, old)
        self.seen += 1 if new.keep is None else new.keep[:, 0].long()
        at = self.keys, self.values, here, self.span, new.scale, new.slopes
        return decode(Step(new.near[:, :, 0], new.far[:, :, 0], *at))[:, :, None]

    def _chunk(self, new: Tokens) -> Tensor:
        """All tokens at once: window and sinks are two attentions, joined by their sums."""
        if new.keep is None:
            return self._aligned(new, torch.zeros_like(self.seen))
        # Tokens to the right, padding to the left, in each sequence: then distances of columns are those of positions.
        order = torch.argsort(new.keep.byte(), dim=1, stable=True)
        near, far, k, v = (_rows(x, order) for x in (new.near, new.far, new.k, new.v))
        keep = new.keep.gather(1, order)
        out = self._aligned(Tokens(near, far, k, v, keep, new.scale, new.slopes), (~keep).sum(1))
        return _rows(out, order.argsort(1)).masked_fill(~new.keep[:, None, :, None], 0.0)

    def _aligned(self, new: Tokens, pads: Tensor) -> Tensor:
        """The same where the first `pads` (B,) columns of each sequence are padding."""
        length, span = new.k.shape[2], self.span
        columns = torch.arange(1 - span.window, length, device=pads.device)
        at = (self.seen - pads)[:, None] + columns
        seen = (at >= span.sinks) & (at > self.seen[:, None] - span.window)
        k, v = (self._beside_the_past(*x, at, new.keep) for x in ((self.keys, new.k), (self.values, new.v)))
        window, lse = _windowed(new, k, v, seen, span.window)
        t = at[:, span.window - 1 :]
        fresh = t >= self.seen[:, None]
        self._write(new, t[:, -1], pads)
        if not span.sinks:
            return window.to(new.near.dtype)
        return _joined((window, lse), self._of_sinks(new, t, fresh)).to(new.near.dtype)

    def _beside_the_past(self, kept: Tensor, new: Tensor, at: Tensor, keep: Tensor | None) -> Tensor:
        """Rows for the positions `at` (B, M): what is kept of the past, padding replaced by it, then the new ones."""
        past, slots = at.shape[1] - new.shape[2], self.span.slot(at)
        if keep is not None:
            new = torch.where(keep[:, None, :, None], new, _rows(kept, slots[:, past:]))
        return torch.cat([_rows(kept, slots[:, :past]), new], dim=2)

    def _of_sinks(self, new: Tokens, t: Tensor, fresh: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over the sinks alone, in fp32, and its lse; distances to sinks are those of places."""
        dtype, heads = torch.promote_types(new.far.dtype, torch.float32), self.keys.shape[1]
        sinks = torch.arange(self.span.sinks, device=t.device)
        k, v = (x[:, :, None, : self.span.sinks].to(dtype) for x in (self.keys, self.values))
        scores = new.scale * (new.far.to(dtype).unflatten(1, (heads, -1)) @ k.mT)
        if new.slopes is not None:
            away = (self.span.place(t)[..., None] - sinks).to(dtype)
            scores -= new.slopes.to(dtype).view(heads, -1, 1, 1) * away[:, None, None]
        seen = (sinks <= t[..., None]) & fresh[..., None]
        scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
        lse = scores.logsumexp(-1)
        weights = torch.exp(scores - lse.masked_fill(torch.isneginf(lse), 0.0)[..., None])
        # A sink that is not there yet may hold what was taken back, NaN too.
        o = weights @ v.masked_fill((sinks >= self.seen[:, None])[:, None, None, :, None], 0.0)
        return o.flatten(1, 2), lse.flatten(1, 2)

    def _write(self, new: Tokens, newest: Tensor, pads: Tensor) -> None:
        """Each slot fetches the token that it should hold now, if that is a new one."""
        source = self.span.held(newest) - self.seen[:, None] + pads[:, None]
        length = new.k.shape[2]
        take = ((source >= pads[:, None]) & (source < length))[:, None, :, None]
        source = source.clamp(0, max(0, length - 1))
        for kept, fresh in ((self.keys, new.k), (self.values, new.v)):
            kept.copy_(torch.where(take, _rows(fresh, source), kept))
        self.seen.copy_(newest + 1)

    def check_crop(self, tokens: int) -> None:
        """Raises UnsupportedError if the last `tokens` of each sequence cannot be taken back. Waits for the device."""
        if tokens < 0:
            raise OptionError(f"tokens={tokens}; wanted how many to take back, 0 or more")
        span, left = self.span, self.seen - tokens
        oldest = (left - span.window + 1).clamp(min=span.sinks)
        top = torch.maximum(self.top, self.seen)
        there = (left >= 0) & ((oldest >= left) | (oldest + span.ring >= top))
        if not bool(there.all()):
            raise UnsupportedError(
                f"{tokens} tokens cannot be taken back from sequences of {self.seen.tolist()}: they are not there, or "
                f"what the next query would see is gone; wanted at most {span.spare + 1}, or a larger rollback="
            )

    def crop(self, tokens: int) -> None:
        """Takes the last `tokens` of each sequence back. What was dropped stays so: more than `spare` + 1 can be taken
        back only where nothing that the next query sees has been overwritten, which `check_crop` tells.
        """
        self.check_crop(tokens)
        torch.maximum(self.top, self.seen, out=self.top)
        self.seen -= tokens

    def reset(self) -> None:
        """Forgets everything, and keeps the memory."""
        for name in FIELDS:
            getattr(self, name).zero_()

    def state(self) -> dict[str, Tensor]:
        """Copies of everything that a ring holds."""
        return {name: getattr(self, name).clone() for name in FIELDS}

    @staticmethod
    def of_state(span: Span, saved: dict[str, Tensor]) -> "Ring":
        """A ring that continues where `state` was taken; raises ShapeError if it was taken of another span."""
        if saved["keys"].shape[2] != span.slots:
            raise ShapeError(f"the saved keys have {saved['keys'].shape[2]} slots; wanted {span.slots}")
        ring = Ring(span, saved["keys"], saved["values"])
        for name in FIELDS:
            getattr(ring, name).copy_(saved[name])
        return ring

    def select(self, rows: Tensor) -> None:
        """Row n becomes what row rows[n] was (beam search); any number of rows, in place where the number stays."""
        for name in FIELDS:
            old = getattr(self, name)
            chosen = old.index_select(0, rows.to(old.device))
            setattr(self, name, old.copy_(chosen) if chosen.shape == old.shape else chosen)


def refuse_gradients(*tensors: Tensor) -> None:
    """Raises UnsupportedError where a gradient would be expected of what a cache computes."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise UnsupportedError(
            "gradients through a cache: there are none; wanted torch.no_grad() around decoding"
        )


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, N, D) at positions index (B, M) of its third dimension."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _windowed(new: Tokens, k: Tensor, v: Tensor, keep: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Attention of the last columns to the last `window` that are kept, and its lse; empty rows are zero and -inf.

    On the CPU half types are widened first, which the kernel does there anyway: so that o is rounded only once joined.
    """
    q, offset = new.near, k.shape[2] - new.k.shape[2]
    if not q.is_cuda and q.dtype.itemsize < 4:
        q, k, v = q.float(), k.float(), v.float()
    slopes = None if new.slopes is None else new.slopes[None]
    structure = (new.scale, offset, window, 0, 0, None, "zero", slopes, offset, False)
    o, lse, _ = attend(q, k, v, None, None, keep, None, *structure)
    return o, lse


def _joined(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """Softmax over two sets of keys from the softmax over each: o = sum o_i e^(lse_i - lse)."""
    lse = torch.logaddexp(a[1], b[1])
    lse = lse.masked_fill(torch.isneginf(lse), 0.0)[..., None]
    parts = (o.to(lse.dtype) * torch.exp(part[..., None] - lse) for o, part in (a, b))
    return sum(parts, torch.zeros_like(lse))
