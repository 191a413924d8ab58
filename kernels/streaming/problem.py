"""One call of the kernel as data, and what both paths, torch and Triton, do with rows that see no key."""

from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.kernels.streaming.reach import Reach


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """Everything that one softmax attention reads.

    q (B, H, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), any strides; query head h reads kv head h // (H / Hkv).
    bias: float, broadcastable to (B, H, Sq, Sk), added to the scaled scores. mask: bool, same, True is visible.
    key_padding: bool (B, Sk), True is kept. sink_logits: float (H,), exp(z) joins each row's denominator.
    softcap: cap * tanh(scores / cap) before the bias. empty_row: "nan", "zero" or "uniform". slopes: float (B or 1, H);
    slopes * (j - i - diagonal) is one more bias, or minus slopes * |j - i - diagonal| if `symmetric`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    key_padding: Tensor | None
    sink_logits: Tensor | None
    scale: float
    reach: Reach
    softcap: float | None
    empty_row: str
    slopes: Tensor | None = None
    diagonal: int = 0
    symmetric: bool = False

    @property
    def group(self) -> int:
        """Query heads to one key/value head."""
        return self.q.shape[1] // max(1, self.k.shape[1])

    @property
    def accumulate(self) -> torch.dtype:
        """The dtype of scores, sums and softmax statistics."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def returns_the_mean(self) -> bool:
        """Whether some query may see no key, and then returns the mean of the values."""
        return self.empty_row == "uniform" and self.k.shape[2] > 0 and self.may_leave_rows_empty

    @property
    def may_leave_rows_empty(self) -> bool:
        """Whether some query may see no key, by the structure or for what the tensors hold."""
        hidden_by_data = any(t is not None for t in (self.bias, self.mask, self.key_padding))
        return hidden_by_data or self.reach.may_leave_a_row_empty()


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """o (B, H, Sq, Dv) in q's dtype; lse and log_sum (B, H, Sq), fp32 (fp64 for fp64), natural logarithms.

    lse is -inf where the row is empty. log_sum = lse - (the row's largest logit) is kept apart, because beside a
    logit such as finfo.min it would be rounded away, and with it the weights in the backward.
    """

    o: Tensor
    lse: Tensor
    log_sum: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """In the dtype and shape of what they belong to; None where there is no such input or it was not asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    sink_logits: Tensor | None
    slopes: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which gradients are asked for beside those of q, k, v and the sink logits; the torch path alone has these."""

    bias: bool = False
    slopes: bool = False


def fill_empty_rows(problem: Problem, o: Tensor, lse: Tensor) -> Tensor:
    """`o` with the rows whose largest logit is -inf replaced by what `empty_row` says.

    "uniform" is the mean of all Sk values, hidden ones included: it stands for scores that a finite fill absorbed.
    Where nothing hides a key there was no fill, and -inf everywhere is what a plain softmax makes of it: NaN.
    Without keys at all (Sk = 0) a row is zero in every meaning: so is a plain softmax times an empty V.
    """
    if problem.k.shape[2] == 0:
        return o
    empty = torch.isneginf(lse)[..., None]
    if problem.returns_the_mean:
        mean = (
            problem.v.to(problem.accumulate).mean(dim=2, keepdim=True).repeat_interleave(problem.group, dim=1)
        )
        return torch.where(empty, mean.to(o.dtype), o)
    return o.masked_fill(empty, 0.0 if problem.empty_row == "zero" else float("nan"))


def live_gradient(problem: Problem, answer: Answer, do: Tensor) -> Tensor:
    """`do` in the accumulation dtype, zero in empty rows: these pass no gradient through the softmax."""
    return do.to(problem.accumulate).masked_fill(torch.isneginf(answer.lse)[..., None], 0.0)


def live_lse_gradient(answer: Answer, dlse: Tensor | None) -> Tensor:
    """`dlse` (B, H, Sq), zero in empty rows, or where there is none."""
    if dlse is None:
        return torch.zeros_like(answer.lse)
    return dlse.to(answer.lse.dtype).masked_fill(torch.isneginf(answer.lse), 0.0)


def row_peak(answer: Answer) -> Tensor:
    """The largest logit of each row (B, H, Sq); zero where the row is empty, so that exp(-inf - peak) is zero."""
    return (answer.lse - answer.log_sum).masked_fill(torch.isneginf(answer.lse), 0.0)


def add_mean_gradient(problem: Problem, answer: Answer, do: Tensor, dv: Tensor) -> Tensor:
    """`dv` (B, Hkv, Sk, Dv) and what the empty rows add to it where they return the mean of V."""
    if not problem.returns_the_mean:
        return dv
    live = ~torch.isneginf(answer.lse)[..., None]
    total = do.to(problem.accumulate).masked_fill(live, 0.0).sum(dim=2)
    shared = total.unflatten(1, (-1, problem.group)).sum(dim=2)
    return dv + (shared / dv.shape[2])[:, :, None, :]


def sink_gradient(problem: Problem, answer: Answer, delta: Tensor) -> Tensor | None:
    """dz (H,) of the sink logits: -sum over rows of p_sink * delta, with delta (B, H, Sq) less the gradient of lse."""
    z = problem.sink_logits
    if z is None:
        return None
    lse = torch.where(torch.isneginf(answer.lse), torch.inf, answer.lse)
    weight = torch.exp(z.to(delta.dtype)[:, None] - lse)
    return -(weight * delta).sum(dim=(0, 2)).to(z.dtype)
