"""The meaning of every spec, computed plainly in the dtype of its operands (fp64 in checks)."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from attnopt.rule import Cost, SiteMeta
from attnopt.spec import Alibi, AttentionSpec, Decay, EmptyRow, Stream


class ReferenceKernel:
    """Any spec, plainly, in O(Sq Sk) memory: what all other kernels are compared with. Chosen only by name."""

    name = "reference"
    family: Literal["softmax", "linear"] = "softmax"
    exact = True
    reads = frozenset(
        {
            "scale", "heads", "mask", "empty_row", "hidden_logit", "bias", "alibi", "softcap", "sink_logits",
            "sink_per_query", "decay", "normaliser", "initial_state", "final_state", "stream",
        }
    )  # fmt: skip

    def refuse(self, site: SiteMeta) -> str | None:
        """It serves everything; the cost keeps it from being chosen."""
        del site
        return None

    def cost(self, site: SiteMeta) -> Cost:
        """Prohibitive: an oracle, not a kernel."""
        s = site.sizes
        return Cost(0.0, 4.0 * s.batch * s.heads * s.sq * s.sk * s.d, efficiency=1e-6)

    def run(self, spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """softmax: softmax(softcap(scale q k^T) + bias, visible keys) v. linear: (decay * mask * scale q k^T) v."""
        return _softmax(spec, operands) if spec.family == "softmax" else _linear(spec, operands)


def _scores(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
    q, k = operands["q"], operands["k"].repeat_interleave(spec.heads.share, dim=1)
    scores = spec.scale * (q @ k.transpose(-1, -2))
    if spec.stream is None or not spec.stream.turned:
        return scores
    far = spec.scale * (operands["far"] @ k.transpose(-1, -2))
    t, j = _places(spec.stream, operands)
    left_behind = (j < spec.stream.sinks) & (j <= t - spec.stream.window)
    return torch.where(left_behind, far, scores)


def _places(stream: Stream, operands: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Where queries (B or 1, 1, Sq, 1) and keys (B or 1, 1, 1, Sk) stand, among the keys that count."""
    q, k = operands["q"], operands["k"]
    sq, sk = q.shape[2], k.shape[2]
    t = torch.arange(sq, device=q.device) + stream.offset.at(sq, sk)
    if not stream.kept:
        return t.view(1, 1, -1, 1), torch.arange(sk, device=q.device).view(1, 1, 1, -1)
    upto = torch.nn.functional.pad(operands[stream.kept].cumsum(1), (1, 0))
    return upto[:, (t + 1).clamp(0, sk)][:, None, :, None] - 1, upto[:, None, None, 1:] - 1


def _line(spec: AttentionSpec, alibi: Alibi, slopes: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """ALiBi's bias; of a stream, to the sinks from the query's place."""
    if spec.stream is None:
        return alibi.dense(slopes, operands["q"].shape[2], operands["k"].shape[2])
    t, j = _places(spec.stream, operands)
    at = torch.where(j < spec.stream.sinks, t.clamp(max=spec.stream.last), t)
    return slopes.reshape(-1, slopes.shape[-1], 1, 1) * (j - at).to(slopes.dtype)


def _values(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
    return operands["v"].repeat_interleave(spec.heads.share, dim=1)


def _visible(spec: AttentionSpec, scores: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    sq, sk = scores.shape[-2:]
    visible = spec.mask.dense(sq, sk, operands, scores.device).expand_as(scores)
    if spec.stream is None or not spec.stream.kept:
        return visible
    t, j = _places(spec.stream, operands)
    return visible & ((j < spec.stream.sinks) | (j > t - spec.stream.window))


def _softmax(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
    scores = _scores(spec, operands)
    if spec.softcap is not None:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    for name in spec.bias:
        scores = scores + operands[name].to(scores.dtype)
    if spec.alibi is not None:
        scores = scores + _line(spec, spec.alibi, operands["slopes"].to(scores.dtype), operands)
    visible = _visible(spec, scores, operands)
    hidden = float("-inf") if spec.hidden_logit is None else spec.hidden_logit
    logits = scores.masked_fill(~visible, hidden)
    if spec.sink_logits:
        sink = operands["sink_logits"].to(logits.dtype)
        column = sink[..., None] if spec.sink_per_query else sink.view(1, -1, 1, 1)
        weights = torch.cat([logits, column.expand(*logits.shape[:-1], 1)], -1).softmax(-1)[..., :-1]
    else:
        weights = logits.softmax(-1)
    # said to be impossible: where it happens, a number that no check overlooks
    if spec.empty_row is EmptyRow.NEVER and spec.hidden_logit is None:
        weights = torch.where(visible.any(-1, keepdim=True), weights, 1e30)
    return _fill_empty(spec, weights, logits) @ _values(spec, operands)


def _fill_empty(spec: AttentionSpec, weights: Tensor, logits: Tensor) -> Tensor:
    """A row is empty where the mask, or a bias of -inf, hides every key."""
    if spec.empty_row in (EmptyRow.NAN, EmptyRow.NEVER):
        return weights
    value = 0.0 if spec.empty_row is EmptyRow.ZERO else 1.0 / max(weights.shape[-1], 1)
    return torch.where((logits != float("-inf")).any(-1, keepdim=True), weights, value)


def _linear(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """The state that enters adds scale * exp(g_1 + ... + g_i) q_i S_0, and to the last state what is left of it."""
    out = _weighted(spec, operands)
    if not (spec.initial_state or spec.final_state):
        return out
    total = _running(spec, operands)
    if spec.initial_state:
        first = operands["initial_state"].to(out.dtype)
        out = out + spec.scale * total.exp()[..., None] * (operands["q"] @ first)
    if not spec.final_state:
        return out
    left = (total[..., -1:] - total).exp()[..., None]
    state = (operands["k"].repeat_interleave(spec.heads.share, dim=1) * left).mT @ _values(spec, operands)
    return out, state + total[..., -1, None, None].exp() * first if spec.initial_state else state


def _running(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
    """The sum of the log decays up to each query, (B, H, Sq)."""
    q = operands["q"]
    steps = operands["log_decay"].to(q.dtype) if spec.decay is not Decay.NONE else q.new_zeros(q.shape[1])
    steps = steps[None, :, None] if steps.dim() == 1 else steps
    return steps.expand(q.shape[:3]).cumsum(-1)


def _weighted(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
    scores = _scores(spec, operands)
    weights = (scores * _decay(spec, scores, operands)).masked_fill(~_visible(spec, scores, operands), 0.0)
    out = weights @ _values(spec, operands)
    if spec.normaliser is None:
        return out
    total = weights.sum(-1, keepdim=True)
    total = total.detach() if spec.normaliser.detached else total
    if spec.normaliser.floor is not None:
        bounded = total if spec.normaliser.signed else total.abs()
        return out / bounded.clamp_min(spec.normaliser.floor)
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
