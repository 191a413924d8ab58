"""Lightning Attention as a kernel for linear sites: causal with or without decay, or full; exact, differentiable."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.kernels.lightning.checks import DTYPES
from attnopt.kernels.lightning.chunked import CHUNK
from attnopt.kernels.lightning.op import lightning_attention
from attnopt.mask import Band, Length, band
from attnopt.rule import Cost, SiteMeta
from attnopt.spec import AttentionSpec, Decay, Normaliser


class LightningKernel:
    """Linear attention in O(N) (Lightning Attention-2, arXiv 2401.04658), whatever the site spells out."""

    name = "lightning"
    family: Literal["softmax", "linear"] = "linear"
    exact = True
    reads = frozenset({"scale", "heads", "mask", "decay", "normaliser", "initial_state", "final_state"})

    def refuse(self, site: SiteMeta) -> str | None:
        """Serves full masks without decay and square causal ones with any decay; keys may be padded."""
        dtypes = {site.operands[name].dtype for name in "qkv"}
        if len(dtypes) != 1 or not dtypes <= set(DTYPES):
            return f"q, k and v are {', '.join(sorted(map(str, dtypes)))}: wanted one floating dtype"
        form = band(site.spec.mask)
        stateful = site.spec.initial_state or site.spec.final_state
        if stateful and site.spec.normaliser is not None:
            return "a state is passed on, and the output is divided by a sum whose state is not"
        if form is None or not _is_simple(form):
            return f"mask {site.spec.mask}: wanted full or causal, with or without key padding"
        if form.offset is None:
            return None if site.spec.decay is Decay.NONE else "decay without causal order has no meaning"
        if site.sizes.sq != site.sizes.sk or not _is_diagonal(form.offset):
            return f"{form.offset} is not the diagonal of a square ({site.sizes.sq} queries, {site.sizes.sk} keys)"
        return None

    def cost(self, site: SiteMeta) -> Cost:
        """Each operand read once, the output written once; products inside chunks and with the state."""
        s = site.sizes
        rows = s.batch * (s.heads * s.sq + s.kv_heads * s.sk) * (s.d + s.dv)
        form = band(site.spec.mask)
        inside = 0.0 if form is None or form.offset is None else 2.0 * s.sq * CHUNK * (s.d + s.dv)
        flops = s.batch * s.heads * (inside + 2.0 * (s.sq + s.sk) * s.d * s.dv)
        passes = 1 if site.spec.normaliser is None else 2
        return Cost(float(rows * site.operands["q"].dtype.itemsize * passes), flops, efficiency=0.4)

    def run(self, spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """One call of lightning_attention; a normaliser is a second one, with a single column of ones as values."""
        form = band(spec.mask)
        if form is None or not _is_simple(form):
            raise UnsupportedError(f"mask {spec.mask}; wanted full or causal, with or without key padding")
        q, v, log_decay = operands["q"], operands["v"], operands.get("log_decay")
        k = _without_padding(operands["k"], operands[form.padding] if form.padding else None)
        causal = form.offset is not None
        if spec.initial_state or spec.final_state:
            first = operands.get("initial_state")
            both = lightning_attention(
                q,
                k,
                v,
                log_decay=log_decay,
                scale=spec.scale,
                initial_state=first,
                return_state=True,
                causal=causal,
            )
            return both if spec.final_state else both[0]
        out = lightning_attention(q, k, v, log_decay=log_decay, scale=spec.scale, causal=causal)
        if spec.normaliser is None:
            return out
        # In fp32: a rounded sum would add its error to every element of a row alike.
        wide = torch.promote_types(q.dtype, torch.float32)
        ones = v.new_ones(1, dtype=wide).expand(*v.shape[:3], 1)
        total = lightning_attention(
            q.to(wide), k.to(wide), ones, log_decay=log_decay, scale=spec.scale, causal=causal
        )
        return (out / _denominator(total, spec.normaliser)).to(out.dtype)


def _is_simple(form: Band) -> bool:
    return form == Band(offset=form.offset, padding=form.padding)


def _is_diagonal(offset: Length) -> bool:
    """Whether the mask is j <= i wherever Sq == Sk."""
    return offset.const == 0 and offset.sq == -offset.sk


def _without_padding(k: Tensor, keep: Tensor | None) -> Tensor:
    """A key of zeros has no weight, and leaves the state alone."""
    return k if keep is None else torch.where(keep[:, None, :, None], k, 0.0)


def _denominator(total: Tensor, normaliser: Normaliser) -> Tensor:
    """sum(w) + eps, or max(|sum(w)|, floor), or max(sum(w), floor); (B, H, Sq, 1)."""
    total = total.detach() if normaliser.detached else total
    if normaliser.floor is None:
        return total + normaliser.eps
    return (total if normaliser.signed else total.abs()).clamp_min(normaliser.floor)


KERNEL = LightningKernel()
