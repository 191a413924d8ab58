"""SparQ as a kernel for decoding sites: an approximation of softmax attention, chosen only when the user names it."""

from collections.abc import Mapping
from functools import reduce
from operator import and_
from typing import Literal

import torch
from torch import Tensor

from attnopt.kernels.sparq.op import sparq_attention
from attnopt.kernels.sparq.request import DTYPES
from attnopt.mask import FULL, And, Causal, Mask
from attnopt.rule import Cost, SiteMeta
from attnopt.spec import AttentionSpec, EmptyRow, Sparse

#: What a spec without an approximation means here: every key is read.
EVERYTHING = Sparse(rank=1, topk=2**31 - 1, local=0)


class SparqKernel:
    """One query over a cache of keys: `topk` of them, chosen by `rank` channels (arXiv 2312.04985).

    Where the site reads a cache of `attnopt.caches.sparq` the spec names the keys by channel and the running mean of
    the values as operands. Elsewhere the channels are picked out of k, and with as many kv heads as query heads the
    mean of v is taken anew, which reads all of both: the saving in traffic that the paper shows is not to be had.
    """

    name = "sparq"
    family: Literal["softmax", "linear"] = "softmax"
    exact = False
    reads = frozenset({"scale", "heads", "mask", "empty_row", "sparse"})

    def refuse(self, site: SiteMeta) -> str | None:
        """Serves one query token, without gradients, under any mask that all heads share, where it was asked for."""
        if site.spec.sparse is None:
            return "the attention is to be exact: SparQ approximates, and was not asked for"
        if site.sizes.sq != 1:
            return f"SparQ decodes one query token at a time, this site has {site.sizes.sq}: prefill is dense"
        if site.gradient:
            return "SparQ has no gradient: the choice of keys has no derivative"
        dtypes = {site.operands[name].dtype for name in "qkv"}
        if len(dtypes) != 1 or not dtypes <= set(DTYPES):
            return f"q, k and v are {', '.join(sorted(map(str, dtypes)))}: wanted one floating dtype"
        return _refuse_mask(site)

    def cost(self, site: SiteMeta) -> Cost:
        """Reads r channels of k_t, or all of k, the chosen keys and values, and all of v where it takes a mean."""
        s, sparse = site.sizes, site.spec.sparse or EVERYTHING
        chosen, takes_mean = min(sparse.topk, s.sk), s.heads == s.kv_heads and "v_mean" not in sparse.beside
        scored = min(sparse.rank, s.d) if "k_t" in sparse.beside else s.d
        elements = s.sk * scored + chosen * (s.d + s.dv) + (s.sk * s.dv if takes_mean else 0)
        flops = 2.0 * s.batch * s.heads * (s.sk * min(sparse.rank, s.d) + chosen * (s.d + s.dv))
        return Cost(float(s.batch * s.kv_heads * elements * site.operands["q"].dtype.itemsize), flops)

    def run(self, spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
        """(B, H, 1, Dv). A row that sees no key has the spec's meaning; a uniform one over the keys that are chosen."""
        q, k = operands["q"], operands["k"]
        kept = _kept(spec.mask, operands, q.shape[0], k.shape[2], q.device)
        if kept is None or spec.empty_row in (EmptyRow.NEVER, EmptyRow.ZERO):
            return _attend(spec, operands, q, kept)
        seen = kept.any(dim=-1)[:, None, None, None]
        if spec.empty_row is EmptyRow.NAN:
            return torch.where(seen, _attend(spec, operands, q, kept), float("nan"))
        # A zero query weighs all keys alike.
        return _attend(spec, operands, q.where(seen, 0.0), kept | ~seen[:, 0, 0])


def _attend(spec: AttentionSpec, held: Mapping[str, Tensor], q: Tensor, kept: Tensor | None) -> Tensor:
    s = spec.sparse or EVERYTHING
    return sparq_attention(
        q, held["k"], held["v"], rank=s.rank, topk=s.topk, local=s.local, scale=spec.scale, key_padding=kept,
        k_t=held.get("k_t"), v_mean=held.get("v_mean"),
    )  # fmt: skip


def _refuse_mask(site: SiteMeta) -> str | None:
    for name in site.spec.mask.operand_names():
        shape = site.operands[name].shape
        if len(shape) != 2 and (len(shape) != 4 or shape[1] != 1):
            return f"mask {name} has shape {tuple(shape)}: wanted one that all heads share, (B, 1, 1, Sk) or (B, Sk)"
    return None


def _kept(
    mask: Mask, operands: Mapping[str, Tensor], batch: int, sk: int, device: torch.device
) -> Tensor | None:
    """The row of the mask as (B, Sk) bool, or None where the one query is proven to see every key."""
    parts = mask.parts if isinstance(mask, And) else (mask,)
    hiding = reduce(and_, (part for part in parts if not _shows_all(part)), FULL)
    if hiding == FULL:
        return None
    row = hiding.dense(1, sk, operands, device)[..., 0, :]
    return (row[:, 0] if row.ndim == 3 else row).expand(batch, sk)


def _shows_all(mask: Mask) -> bool:
    """Whether one query sees every key under this mask, whatever Sk is."""
    if not isinstance(mask, Causal):
        return mask == FULL
    return mask.offset.sk >= 1 and mask.offset.const + mask.offset.sq >= -1


KERNEL = SparqKernel()
