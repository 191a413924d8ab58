"""Keys that a mask does not remove: it sets their logits to a number, such as -10000, that may still weigh.

All hidden keys of a row have the same logit c, so that together they are one more key: its value is their mean, its
logit c plus the logarithm of their number n. It joins the visible keys as a block joins others in an online softmax
(Milakov and Gimelshein, arXiv 1805.02867): by w = n e^c / (n e^c + e^lse).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from attnopt.kernels.streaming.op import four_dimensional
from attnopt.mask import Causal, Mask


def join(o: Tensor, lse: Tensor, others: tuple[Tensor, Tensor], logit: float) -> Tensor:
    """Attention over visible and hidden keys.

    o (B, H, Sq, Dv), lse (B, H, Sq): of the visible keys, zero and -inf in rows that see none. others: mean (B, H, Sq,
    Dv) of the hidden keys' values, log_count (B or 1, H or 1, Sq). logit: of each hidden key, with its scale and bias.
    """
    mean, log_count = others
    weight = torch.sigmoid(logit + log_count - lse)[..., None]
    return torch.lerp(o.to(weight.dtype), mean.to(weight.dtype), weight).to(o.dtype)


def hidden_keys(mask: Mask, operands: Mapping[str, Tensor], q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the values that `mask` hides from each query (B, H, Sq, Dv), log of their number (B or 1, H or 1, Sq).

    Zero and -inf where it hides none. operands: the tensors that the mask names.
    """
    if isinstance(mask, Causal):
        return _after(mask, q, v)
    visible = mask.dense(q.shape[2], v.shape[2], operands, q.device)
    hidden, share = ~four_dimensional(visible), q.shape[1] // v.shape[1]
    wide, count = torch.promote_types(v.dtype, torch.float32), hidden.sum(-1)
    weights = hidden.to(wide) / count.clamp(min=1)[..., None]
    if hidden.shape[1] == 1:  # all heads of a group have the same mean
        mean = (weights @ v.to(wide)).repeat_interleave(share, dim=1)
    else:
        mean = weights @ v.to(wide).repeat_interleave(share, dim=1)
    return mean, count.to(wide).log()


def _after(mask: Causal, q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same of the keys behind the last that each query sees: sums from the end, O(Sk Dv)."""
    sq, sk = q.shape[2], v.shape[2]
    first = (torch.arange(sq, device=q.device) + (mask.offset.at(sq, sk) + 1)).clamp(0, sk)
    wide = v.to(torch.promote_types(v.dtype, torch.float32))
    sums = torch.nn.functional.pad(wide.flip(2).cumsum(2).flip(2), (0, 0, 0, 1))
    count = (sk - first).to(wide.dtype)
    mean = sums.index_select(2, first) / count.clamp(min=1)[:, None]
    return mean.repeat_interleave(q.shape[1] // v.shape[1], dim=1), count.log()[None, None]
