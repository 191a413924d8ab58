"""torch's own scaled_dot_product_attention, stated exactly: the best there is for dense and causal masks."""

from collections.abc import Iterator, Mapping
from math import prod
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from attnopt.mask import FULL, TOP_LEFT, And, Causal, Full, KeyPadding, Mask, Opaque
from attnopt.rule import Cost, SiteMeta
from attnopt.spec import MEANS, AttentionSpec, EmptyRow

#: Bytes moved for each pair of positions when a mask is built: two comparisons and their conjunction.
_BUILT = 8.0

#: Bytes moved for each head and pair when a bias is built from slopes: written, hidden keys filled in, and cast.
_LINE = 12.0

#: A number at or below this absorbs any score that it is added to.
ABSORBING = -1e30

#: Rows of a bias whose largest number lies between these magnitudes are taken relative to it before gradients are
#: computed: from above, what is left of a score is left in fp32 as well; below, nothing is lost.
FAR, LOST = 64.0, 1e12

LOST_SUMS = (
    "a bias that comes from data may hold a row of lowest numbers, whose gradients the library computes from a sum "
    "that they absorb"
)


class SdpaKernel:
    """Softmax attention that `scaled_dot_product_attention` states exactly, served by torch's fused backends."""

    name = "sdpa"
    family: Literal["softmax", "linear"] = "softmax"
    exact = True
    reads = frozenset(
        {"scale", "heads", "mask", "empty_row", "bias", "alibi", "sink_logits", "sink_per_query", "dropout"}
    )

    def refuse(self, site: SiteMeta) -> str | None:
        """Serves floating point of any device, shape and mask."""
        dtype = site.operands["q"].dtype
        if not dtype.is_floating_point:
            return f"dtype {dtype} is not floating point"
        if site.spec.dropout and site.spec.empty_row is EmptyRow.UNIFORM:
            return "with dropout, a row without keys would be the mean of some values only"
        return LOST_SUMS if _may_lose_sums(site) else None

    def cost(self, site: SiteMeta) -> Cost:
        """All pairs are computed, half of them under a plain causal mask; a dense mask is read once per head.

        Learned sinks are one more column of the mask: it becomes dense, and keys and values are copied. A bias that is
        linear in the distance is built for every head: Sq x Sk numbers each, which a blockwise kernel never holds.
        """
        s, spec = site.sizes, site.spec
        share = 0.5 if _is_causal_flag(spec) else 1.0
        width = site.operands["q"].dtype.itemsize
        masked = 0.0 if _needs_no_mask(spec) else float(s.batch * s.heads * s.sq * s.sk * width)
        keys = s.kv_heads * s.sk * (3 if spec.sink_logits else 1)
        rows = s.batch * (s.heads * s.sq * (s.d + s.dv) + keys * (s.d + s.dv))
        flops = 2.0 * s.batch * s.heads * s.sq * s.sk * (s.d + s.dv) * share
        built = 0.0 if _needs_no_mask(spec) or _is_given(spec.mask) else _BUILT * s.sq * s.sk
        built += 0.0 if spec.alibi is None else _LINE * _slopes(site) * s.sq * s.sk
        efficiency = 0.6 if _needs_no_mask(spec) else 0.35
        return Cost(rows * width + masked + built, flops, efficiency)

    def run(self, spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
        """One call of scaled_dot_product_attention, and what it leaves open: rows that see no key."""
        q, k, v = (operands[name] for name in "qkv")
        scale = spec.scale
        if scale <= 0:  # the library multiplies hidden scores, -inf, by it
            q, scale = (-q, -scale) if scale < 0 else (q * 0.0, 1.0)
        visible = None if spec.mask == FULL or _is_causal_flag(spec) else _visible(spec, q, k, operands)
        mask = _attention_mask(spec, visible, operands)
        if spec.sink_logits:
            k, v, mask = _with_sinks(spec, operands, mask)
        if mask is not None and (spec.bias or spec.alibi) and torch.is_grad_enabled():
            mask = _brought_near(mask)
        out = functional.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask,
            dropout_p=spec.dropout,
            is_causal=_is_causal_flag(spec),
            scale=scale,
            enable_gqa=spec.heads.share != 1,
        )  # fmt: skip
        settled = spec.sink_logits or _absorbs(spec)
        out = out if settled or mask is None else _fill_empty(spec, out, mask, operands)
        return _spoilt(out, q) if q.device.type == "cpu" else out


def _spoilt(out: Tensor, q: Tensor) -> Tensor:
    """NaN where the query has NaN or infinity, as softmax gives; the library's CPU kernel may give zeros there."""
    return torch.where(q.isfinite().all(-1, keepdim=True), out, float("nan"))


def _may_lose_sums(site: SiteMeta) -> bool:
    """Whether the CPU's blockwise backward pass would follow a bias of which nothing is known.

    Dropout and sinks take the library's pass that keeps the weights. Where the graph makes the very call, its
    gradients are the library's already.
    """
    spec, flash = site.spec, site.device.type == "cpu" and not site.library
    return site.gradient and flash and bool(spec.bias) and not (spec.dropout or spec.sink_logits)


def _brought_near(mask: Tensor) -> Tensor:
    """The mask less the largest number of each row where that is far from 0, which softmax takes no notice of.

    Blockwise backward passes work from lse = largest + log(sum), which beside -1e9 says nothing of the sum. A row
    so low that its scores are lost stays as it is: brought near, it would be another row.
    """
    if mask.shape[-1] == 0:
        return mask
    top = mask.detach().amax(-1, keepdim=True)
    size = top.abs()
    return mask - top.where((size > FAR) & (size < LOST), 0.0)


def _slopes(site: SiteMeta) -> int:
    """How many slopes there are: B H, or H where all sequences share them."""
    return prod(site.operands["slopes"].shape)


def _is_plain(spec: AttentionSpec) -> bool:
    """Whether nothing is added to the scores or joins them."""
    return not (spec.bias or spec.alibi or spec.sink_logits)


def _is_causal_flag(spec: AttentionSpec) -> bool:
    """Whether `is_causal=True`, which aligns at the top left, says all there is to say."""
    return spec.mask == Causal(TOP_LEFT) and _is_plain(spec)


def _is_given(mask: Mask) -> bool:
    """Whether a tensor says all that the mask does; anything else is built from positions, at each site anew."""
    parts = mask.parts if isinstance(mask, And) else (mask,)
    return all(isinstance(part, Full | Opaque | KeyPadding) for part in parts)


def _needs_no_mask(spec: AttentionSpec) -> bool:
    return _is_causal_flag(spec) or (spec.mask == FULL and _is_plain(spec))


def _visible(spec: AttentionSpec, q: Tensor, k: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    sq, sk = q.shape[2], k.shape[2]
    i = torch.arange(sq, device=q.device)[:, None]
    j = torch.arange(sk, device=q.device)[None, :]
    return spec.mask.visible(i, j, (sq, sk), operands)


def _attention_mask(
    spec: AttentionSpec, visible: Tensor | None, operands: Mapping[str, Tensor]
) -> Tensor | None:
    if _absorbs(spec) and visible is not None:
        return _absorbing(visible, operands["q"].dtype)
    biases = [_as_float(x, operands["q"].dtype) for x in _biases(spec, operands)]
    if not biases:
        return visible
    bias = sum(biases[1:], biases[0])
    return bias if visible is None else torch.where(visible, bias, float("-inf"))


def _biases(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """All that is added to the scores; the line in at least fp32, so that it is not rounded far from the diagonal."""
    yield from (operands[name] for name in spec.bias)
    if spec.alibi is not None:
        slopes = operands["slopes"].to(torch.promote_types(operands["slopes"].dtype, torch.float32))
        yield spec.alibi.dense(slopes, operands["q"].shape[2], operands["k"].shape[2])


def _absorbs(spec: AttentionSpec) -> bool:
    """Whether rows without keys come of a number that is added: with dropout, the mean is not all there is to them."""
    return spec.empty_row is EmptyRow.ABSORBED and spec.dropout > 0


def _absorbing(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add whose finite number absorbs any score: in fp32 where `dtype` does not reach so low."""
    wide = dtype if dtype.is_floating_point and torch.finfo(dtype).min <= ABSORBING else torch.float32
    return torch.zeros_like(visible, dtype=wide).masked_fill(~visible, torch.finfo(wide).min)


def _with_sinks(
    spec: AttentionSpec, operands: Mapping[str, Tensor], mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and mask with one more key, all zeros, whose value is zero and whose logit is the sink's."""
    q, k, v, sink = (operands[name] for name in ("q", "k", "v", "sink_logits"))
    column = sink[..., None] if spec.sink_per_query else sink.view(1, -1, 1, 1)
    column = _as_float(column, q.dtype)
    if mask is None:
        mask = column.new_zeros((1, 1, 1, 1))
    elif mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, float("-inf")).to(column.dtype)
    dtype = torch.promote_types(mask.dtype, column.dtype)
    mask = mask.to(dtype)[(None,) * (4 - mask.dim())]
    rows = (q.shape[0], q.shape[1], q.shape[2])
    mask = torch.cat([mask.expand(*rows, k.shape[2]), column.to(dtype).expand(*rows, 1)], dim=-1)
    return functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1)), mask


def _as_float(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """In q's dtype if it has it, else in fp32: fp32's lowest number does not fit into a half type."""
    return bias if bias.dtype == dtype else bias.to(torch.promote_types(dtype, torch.float32))


def _fill_empty(spec: AttentionSpec, out: Tensor, mask: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """scaled_dot_product_attention returns zeros for a row that the mask, or a bias of -inf, hides altogether."""
    if spec.empty_row is EmptyRow.ZERO or (spec.empty_row is EmptyRow.NEVER and not spec.bias):
        return out
    seen = (mask if mask.dtype == torch.bool else mask != float("-inf")).any(-1, keepdim=True)
    if spec.empty_row not in MEANS:
        return torch.where(seen, out, float("nan"))
    mean = operands["v"].mean(-2, keepdim=True).repeat_interleave(spec.heads.share, dim=1)
    if spec.empty_row is EmptyRow.ABSORBED and torch.is_grad_enabled():
        mean = mean + _nothing_with_gradients(spec, operands)
    return torch.where(seen, out, mean)


def _nothing_with_gradients(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
    """Zeros (B, H, Sq, Dv) with the gradients to q and k of a softmax whose weights are all the same.

    There d(out) = sum over j of (s_j - mean of s) v_j / Sk, to first order in the scores s: a product with K^T V.
    """
    q, k, v = operands["q"], operands["k"], operands["v"].detach()
    apart = (k - k.mean(-2, keepdim=True)).transpose(-1, -2) @ v
    change = q @ apart.repeat_interleave(spec.heads.share, dim=1) * (spec.scale / max(k.shape[2], 1))
    return change - change.detach()


KERNEL = SdpaKernel()
