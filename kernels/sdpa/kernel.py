"""torch's own scaled_dot_product_attention, stated exactly: the best there is for dense and causal masks."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from attnopt.mask import FULL, TOP_LEFT, Causal
from attnopt.rule import Cost, SiteMeta
from attnopt.spec import AttentionSpec, EmptyRow


class SdpaKernel:
    """Softmax attention that `scaled_dot_product_attention` states exactly, served by torch's fused backends."""

    name = "sdpa"
    family: Literal["softmax", "linear"] = "softmax"
    exact = True
    reads = frozenset({"scale", "heads", "mask", "empty_row", "bias"})

    def refuse(self, site: SiteMeta) -> str | None:
        """Serves floating point of any device, shape and mask."""
        dtype = site.operands["q"].dtype
        return None if dtype.is_floating_point else f"dtype {dtype} is not floating point"

    def cost(self, site: SiteMeta) -> Cost:
        """All pairs are computed, half of them under a plain causal mask; a dense mask is read once per head."""
        s, spec = site.sizes, site.spec
        share = 0.5 if _is_causal_flag(spec) else 1.0
        width = site.operands["q"].dtype.itemsize
        masked = 0.0 if _needs_no_mask(spec) else float(s.batch * s.heads * s.sq * s.sk * width)
        rows = s.batch * (s.heads * s.sq * (s.d + s.dv) + s.kv_heads * s.sk * (s.d + s.dv))
        flops = 2.0 * s.batch * s.heads * s.sq * s.sk * (s.d + s.dv) * share
        return Cost(rows * width + masked, flops, efficiency=0.6 if _needs_no_mask(spec) else 0.35)

    def run(self, spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
        """One call of scaled_dot_product_attention, and what it leaves open: rows that see no key."""
        q, k, v = (operands[name] for name in "qkv")
        scale = spec.scale
        if scale <= 0:  # the library multiplies hidden scores, -inf, by it
            q, scale = (-q, -scale) if scale < 0 else (q * 0.0, 1.0)
        visible = None if _needs_no_mask(spec) else _visible(spec, q, k, operands)
        mask = _attention_mask(spec, visible, operands)
        out = functional.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask,
            is_causal=_is_causal_flag(spec),
            scale=scale,
            enable_gqa=spec.heads.share != 1,
        )  # fmt: skip
        out = out if mask is None else _fill_empty(spec, out, mask, v)
        return _spoilt(out, q) if q.device.type == "cpu" else out


def _spoilt(out: Tensor, q: Tensor) -> Tensor:
    """NaN where the query has NaN or infinity, as softmax gives; the library's CPU kernel may give zeros there."""
    return torch.where(q.isfinite().all(-1, keepdim=True), out, float("nan"))


def _is_causal_flag(spec: AttentionSpec) -> bool:
    """Whether `is_causal=True`, which aligns at the top left, says all there is to say."""
    return spec.mask == Causal(TOP_LEFT) and not spec.bias


def _needs_no_mask(spec: AttentionSpec) -> bool:
    return _is_causal_flag(spec) or spec.mask == FULL


def _visible(spec: AttentionSpec, q: Tensor, k: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    sq, sk = q.shape[2], k.shape[2]
    i = torch.arange(sq, device=q.device)[:, None]
    j = torch.arange(sk, device=q.device)[None, :]
    return spec.mask.visible(i, j, (sq, sk), operands)


def _attention_mask(
    spec: AttentionSpec, visible: Tensor | None, operands: Mapping[str, Tensor]
) -> Tensor | None:
    if not spec.bias:
        return visible
    first, *rest = (_as_float(operands[name], operands["q"].dtype) for name in spec.bias)
    bias = sum(rest, first)
    return bias if visible is None else torch.where(visible, bias, float("-inf"))


def _as_float(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """In q's dtype if it has it, else in fp32: fp32's lowest number does not fit into a half type."""
    return bias if bias.dtype == dtype else bias.to(torch.promote_types(dtype, torch.float32))


def _fill_empty(spec: AttentionSpec, out: Tensor, mask: Tensor, v: Tensor) -> Tensor:
    """scaled_dot_product_attention returns zeros for a row that the mask, or a bias of -inf, hides altogether."""
    if spec.empty_row is EmptyRow.ZERO or (spec.empty_row is EmptyRow.NEVER and not spec.bias):
        return out
    seen = (mask if mask.dtype == torch.bool else mask != float("-inf")).any(-1, keepdim=True)
    if spec.empty_row is not EmptyRow.UNIFORM:
        return torch.where(seen, out, float("nan"))
    mean = v.mean(-2, keepdim=True).repeat_interleave(spec.heads.share, dim=1)
    return torch.where(seen, out, mean)


KERNEL = SdpaKernel()
