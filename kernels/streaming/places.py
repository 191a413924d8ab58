"""Streaming attention exact in its positions: a query meets the sinks from its place among the keys that it sees.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.2: positions are
those in the cache, not in the text. The window lies at its true distance from the query. The sinks lie as if the text
between had never been: they are scored with a second query, turned to the place min(t, L - 1), with L = sinks + window.

Where some keys do not count, as in a padded batch, places count the others: each row is what it is without its padding.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.errors import OptionError, ShapeError
from attnopt.kernels.streaming.checks import check
from attnopt.kernels.streaming.kept import counted, cut, rows
from attnopt.kernels.streaming.op import attend, four_dimensional


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """One such attention.

    near, far (B, H, Sq, D): the query as the window's keys are scored with, and the sinks that the window has left
    behind. k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv). Query i stands at t = i + offset; one that sees no key returns zeros.
    bias: float (B or 1, H or 1, Sq or 1, Sk or 1), added. sink_logits: float (H,), exp(z) joins each denominator.
    slopes: float (B or 1, H), times (j - t), and to a sink (j - min(t, L - 1)): ALiBi by places.

    kept: bool (B, Sk), the keys that count. The sinks are the first of them, the window is the last `window`, t and j
    count them. A query whose own key does not count means nothing.
    """

    near: Tensor
    far: Tensor
    k: Tensor
    v: Tensor
    scale: float
    offset: int
    sinks: int
    window: int
    bias: Tensor | None = None
    kept: Tensor | None = None
    sink_logits: Tensor | None = None
    softcap: float | None = None
    slopes: Tensor | None = None


def streaming_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sinks: int = 4,
    window: int = 1024,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_padding: Tensor | None = None,
    slopes: Tensor | None = None,
    far: Tensor | None = None,
) -> Tensor:
    """Causal attention in which each query sees the first `sinks` keys and the last `window`, its own included.

    q: (B, H, Sq, D), k: (B, Hkv, Sk, D), v: (B, Hkv, Sk, Dv); half, bfloat16, float or double; D, Dv <= 256; any
    strides; query head h reads kv head h // (H / Hkv). The last query stands at the last key: with Sq < Sk the
    queries continue a sequence, as in FlashAttention. scale: D ** -0.5 by default. bias: float, broadcastable to
    (B, H, Sq, Sk), added to the scaled scores. key_padding: bool (B, Sk), True where the key is kept.
    slopes: float (H,) or (B, H), times how far a key lies behind the query, which is taken off its score: ALiBi
    (arXiv:2108.12409), without a tensor of all pairs. Returns (B, H, Sq, Dv) in q's dtype; a query that sees no key
    returns zeros.

    far: (B, H, Sq, D), scores the sinks that the window has left behind, and makes positions exact as in StreamingLLM:
    with rotary positions q turned to min(t, sinks + window - 1) instead of t, both k and q at t = Sk - Sq + i. With
    slopes the distance to those sinks is then counted from that place; far=q where nothing is rotated. With key_padding
    the sinks are then the first keys that are kept, the window the last ones, and positions count them: t is the place
    of the query among them, and each row is what it would be without its padding. What a query returns whose own key is
    not kept means nothing.

    Differentiable in q, k, v, far, bias and slopes. Raises ShapeError where tensors do not fit together, OptionError
    where sinks or window cannot be, UnsupportedError where D is too large or the dtype unknown. arXiv 2309.17453,
    section 3.
    """
    if sinks < 0 or window < 1:
        raise OptionError(
            f"sinks={sinks}, window={window}; wanted sinks >= 0 and window >= 1: a query sees itself"
        )
    check(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = None if bias is None else four_dimensional(bias)
    slopes = slopes[None] if slopes is not None and slopes.dim() == 1 else slopes
    if far is not None:
        placed = Placed(q, far, k, v, scale, k.shape[2] - q.shape[2], sinks, window, bias, key_padding)
        return attend_in_places(replace(placed, slopes=slopes))
    offset, prefix, softcap = k.shape[2] - q.shape[2], 0, None
    numbers = (scale, offset, window, sinks, prefix, softcap, "zero")
    return attend(q, k, v, bias, None, key_padding, None, *numbers, slopes, offset, symmetric=False)[0]


def attend_in_places(x: Placed) -> Tensor:
    """(B, H, Sq, Dv) in the dtype of `near`; differentiable in all float tensors.

    The window, and the sinks that are not in it, are two attentions, joined by their sums; sinks inside the window lie
    at their true distance anyway. On the CPU half types are widened first, which the kernel does there too, so that the
    output is rounded once. Nothing depends on which lengths there are, so that graphs of any length can hold it.
    """
    if x.far.shape != x.near.shape or x.far.dtype != x.near.dtype:
        found = f"{x.far.dtype} {tuple(x.far.shape)}"
        raise ShapeError(f"far is {found}; wanted {x.near.dtype} {tuple(x.near.shape)}, as q")
    if x.kept is not None:
        return _among_kept(x, x.kept)
    wide = _widened(x)
    recent = _window(wide)
    return _joined(*recent, *_sinks(wide)).to(x.near.dtype) if x.sinks else recent[0].to(x.near.dtype)


def _widened(x: Placed) -> Placed:
    dtype = torch.promote_types(x.near.dtype, torch.float32) if x.near.device.type == "cpu" else x.near.dtype
    return replace(x, near=x.near.to(dtype), far=x.far.to(dtype), k=x.k.to(dtype), v=x.v.to(dtype))


def _joined(recent: Tensor, recent_lse: Tensor, first: Tensor, first_lse: Tensor) -> Tensor:
    """Two attentions as one. An empty part weighs nothing; two of them are zeros, and pass no NaN back."""
    least = torch.finfo(recent_lse.dtype).min / 2
    recent_lse, first_lse = (t.clamp(min=least) for t in (recent_lse, first_lse))
    share = torch.exp(first_lse - torch.logaddexp(recent_lse, first_lse))[..., None]
    return recent + (first.to(share.dtype) - recent) * share


def _among_kept(x: Placed, keep: Tensor) -> Tensor:
    """Queries and the keys that they see in the order of their places, the last ones at the end; and back."""
    count, out = x.near.shape[2], x.near.dtype
    kept = counted(keep, count, x.offset)
    is_step = (
        isinstance(count, int) and count == 1
    )  # stands at the last key that it sees, wherever its own is
    asked = None if is_step else (kept.slots(kept.last(count)) - x.offset).clamp(0, count - 1)
    ordered = x if asked is None else replace(x, near=rows(x.near, asked), far=rows(x.far, asked))
    places = kept.last(torch.sym_min(count + x.window - 1, keep.shape[1]))
    recent = _window(_widened(_held(ordered, kept.slots(places), asked, places >= 0)))
    made = recent[0]
    if x.sinks:
        places = torch.arange(x.sinks, device=keep.device).expand(keep.shape[0], -1)
        behind = places[:, None, None, :] <= (kept.last(count) - x.window)[:, None, :, None]
        first = _held(ordered, kept.slots(places), asked, None)
        made = _joined(*recent, *_behind(_widened(first), kept.last(count), behind))
    return (made if is_step else rows(made, count - kept.total + kept.places)).to(out)


def _held(x: Placed, slots: Tensor, asked: Tensor | None, kept: Tensor | None) -> Placed:
    """Over the keys at some slots alone, the last of which is that of the last query."""
    bias = None if x.bias is None else cut(x.bias, asked, slots)
    offset = slots.shape[1] - x.near.shape[2]
    return replace(x, k=rows(x.k, slots), v=rows(x.v, slots), bias=bias, offset=offset, kept=kept)


def _behind(x: Placed, t: Tensor, behind: Tensor) -> tuple[Tensor, Tensor]:
    """o and lse over sinks that lie beside each other, of queries at the places t (B, Sq), those that are `behind`."""
    o, lse, _ = attend(
        *(x.far, x.k, x.v, _bias_by_place(x), behind, None, None),
        *(x.scale, None, None, 0, 0, x.softcap, "zero", None, 0, False),
    )
    return o, lse if x.slopes is None else lse + _nearer(x, x.slopes, t[:, None])


def _window(x: Placed) -> tuple[Tensor, Tensor]:
    """o and lse over the last keys, which lie at their true distance."""
    o, lse, _ = attend(
        *(x.near, x.k, x.v, x.bias, None, x.kept, x.sink_logits),
        *(x.scale, x.offset, x.window, 0, 0, x.softcap, "zero", x.slopes, x.offset, False),
    )
    return o, lse


def _sinks(x: Placed) -> tuple[Tensor, Tensor]:
    """o and lse over the first keys that the window has left behind."""
    o, lse, _ = attend(
        *(x.far, x.k, x.v, _bias_by_place(x), None, None, None),
        *(x.scale, x.offset - x.window, 0, x.sinks, 0, x.softcap, "zero", None, 0, False),
    )
    if x.slopes is None:
        return o, lse
    return o, lse + _nearer(x, x.slopes, torch.arange(x.near.shape[2], device=o.device) + x.offset)


def _bias_by_place(x: Placed) -> Tensor | None:
    """What is added to the scores of the sinks, but for `_nearer`."""
    if x.slopes is None:
        return x.bias
    line = _line(x, x.slopes)
    return line if x.bias is None else x.bias.to(line.dtype) + line


def _line(x: Placed, slopes: Tensor) -> Tensor:
    """ALiBi over the sinks from the last place (B or 1, H, 1, Sk): small numbers, whatever the position."""
    dtype = _exact(x, slopes)
    j = torch.arange(x.k.shape[2], device=slopes.device).clamp(max=x.sinks)
    return slopes.to(dtype)[:, :, None, None] * (j - _last(x)).to(dtype)


def _nearer(x: Placed, slopes: Tensor, t: Tensor) -> Tensor:
    """What a row's sinks gain where its query, at t, has not come to the last place yet (B or 1, H, Sq)."""
    dtype = _exact(x, slopes)
    return slopes.to(dtype)[:, :, None] * (_last(x) - t).clamp(min=0).to(dtype)


def _exact(x: Placed, slopes: Tensor) -> torch.dtype:
    """The dtype in which biases are formed: that of the scores, or the slopes' own."""
    scores = torch.promote_types(x.near.dtype, torch.float32)
    return torch.promote_types(slopes.dtype, scores)


def _last(x: Placed) -> int:
    return x.sinks + x.window - 1
