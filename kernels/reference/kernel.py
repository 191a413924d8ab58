"""The meaning of every spec, computed plainly in the dtype of its operands (fp64 in checks)."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from attnopt.rule import Cost, SiteMeta
from attnopt.spec import AttentionSpec, Decay, EmptyRow


class ReferenceKernel:
    """Any spec, plainly, in O(Sq Sk) memory: what all other kernels are compared with. Chosen only by name."""

    name = "reference"
    family: Literal["softmax", "linear"] = "softmax"
    exact = True
    reads = frozenset(
        {"scale", "heads", "mask", "empty_row", "bias", "softcap", "sink_logits", "decay", "normaliser"}
    )

    def refuse(self, site: SiteMeta) -> str | None:
        """It serves everything; the cost keeps it from being chosen."""
        del site
        return None

    def cost(self, site: SiteMeta) -> Cost:
        """Prohibitive: an oracle, not a kernel."""
        s = site.sizes
        return Cost(0.0, 4.0 * s.batch * s.heads * s.sq * s.sk * s.d, efficiency=1e-6)

    def run(self, spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
        """softmax: softmax(softcap(scale q k^T) + bias, visible keys) v. linear: (decay * mask * scale q k^T) v."""
        return _softmax(spec, operands) if spec.family == "softmax" else _linear(spec, operands)


def _scores(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
    q, k = operands["q"], operands["k"].repeat_interleave(spec.heads.share, dim=1)
    return spec.scale * (q @ k.transpose(-1, -2))


def _values(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
    return operands["v"].repeat_interleave(spec.heads.share, dim=1)


def _visible(spec: AttentionSpec, scores: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    sq, sk = scores.shape[-2:]
    return spec.mask.dense(sq, sk, operands, scores.device).expand_as(scores)


def _softmax(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
    scores = _scores(spec, operands)
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    for name in spec.bias:
        scores = scores + operands[name].to(scores.dtype)
    visible = _visible(spec, scores, operands)
    logits = scores.masked_fill(~visible, float("-inf"))
    if spec.sink_logits:
        sink = operands["sink_logits"].to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        weights = torch.cat([logits, sink], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    if (
        spec.empty_row is EmptyRow.NEVER
    ):  # said to be impossible: where it happens, a number that no check overlooks
        weights = torch.where(visible.any(-1, keepdim=True), weights, 1e30)
    return _fill_empty(spec, weights, logits) @ _values(spec, operands)


def _fill_empty(spec: AttentionSpec, weights: Tensor, logits: Tensor) -> Tensor:
    """A row is empty where the mask, or a bias of -inf, hides every key."""
    if spec.empty_row in (EmptyRow.NAN, EmptyRow.NEVER):
        return weights
    value = 0.0 if spec.empty_row is EmptyRow.ZERO else 1.0 / max(weights.shape[-1], 1)
    return torch.where((logits != float("-inf")).any(-1, keepdim=True), weights, value)


def _linear(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
    scores = _scores(spec, operands)
    weights = (scores * _decay(spec, scores, operands)).masked_fill(~_visible(spec, scores, operands), 0.0)
    out = weights @ _values(spec, operands)
    if spec.normaliser is None:
        return out
    total = weights.sum(-1, keepdim=True)
    if spec.normaliser.floor is not None:
        return out / total.abs().clamp_min(spec.normaliser.floor)
    return out / (total + spec.normaliser.eps)


def _decay(spec: AttentionSpec, scores: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """exp(log_decay * (i - j)), or exp(c_i - c_j) with c the running sum; the exponent is masked before exp."""
    if spec.decay is Decay.NONE:
        return torch.ones_like(scores)
    log_decay = operands["log_decay"].to(scores.dtype)
    if spec.decay is Decay.PER_HEAD:
        sq, sk = scores.shape[-2:]
        distance = (
            torch.arange(sq, device=scores.device)[:, None] - torch.arange(sk, device=scores.device)[None, :]
        )
        exponent = log_decay.view(1, -1, 1, 1) * distance
    else:
        total = log_decay.cumsum(-1)
        exponent = total[..., :, None] - total[..., None, :]
    return exponent.masked_fill(~_visible(spec, scores, operands), float("-inf")).exp()


KERNEL = ReferenceKernel()
