"""The custom op `attnopt::sparq_attention`: one decoding step, forward only."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.kernels.sparq.request import Request, check, check_operands

#: The widest head that the Triton kernels hold in registers; wider ones take the torch path.
WIDEST = 256


def sparq_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rank: int = 32,
    topk: int = 128,
    local: int = 32,
    k_t: Tensor | None = None,
    v_mean: Tensor | None = None,
    scale: float | None = None,
    key_padding: Tensor | None = None,
    mean_value: bool | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """One decoding step of SparQ attention (Ribar et al., arXiv 2312.04985, algorithm 1): an approximation.

    The `rank` channels in which the query is largest score all positions; the `topk` best are attended to exactly, the
    last `local` kept ones among them; the mean value stands for the rest. With topk >= Sk this is exact attention.

    q: (B, H, 1, D); k: (B, Hkv, Sk, D); v: (B, Hkv, Sk, Dv); all fp32, bf16 or fp16 (fp64 runs in torch). H is a
        multiple of Hkv: heads of a group share channels (largest sum of |q|) and positions (largest sum of scores).
    k_t: (B, Hkv, D, Sk), the keys channel by channel. With it a step reads rank * Sk + topk * (D + Dv) elements per
        key/value head; without it, by picking channels out of k, nearly all of k.
    v_mean: (B, Hkv, Dv), fp32, the mean of v over the kept positions; None: computed, which reads all of v.
    scale: multiplies q . k, None means D ** -0.5; the approximate logits stand for the same scale.
    key_padding: (B, Sk) bool, True = keep. What padded keys and values hold never reaches the output.
    mean_value: whether the mean value takes the weight of what is left out; None: if H == Hkv, as the authors do.
    starts, lengths: (B,) int32 or int64: the buffers of a cache count from starts (None: 0) to lengths - 1 (None: Sk).

    Returns (B, H, 1, Dv) in q's dtype, contiguous, summed in fp32; rows with no key are zero. Of equals the lower index
    is chosen. Raises ShapeError, OptionError (rank, topk or local cannot be) and UnsupportedError (more than one query;
    or gradients: the choice of positions has no derivative, call it under torch.no_grad()).
    """
    check_operands(q, k, v)
    scale, mean_value = defaults(q, k, scale, mean_value)
    numbers = (rank, topk, local, scale, mean_value)
    out: Tensor = _sparq(q, k, v, k_t, v_mean, key_padding, *numbers, starts, lengths)
    return out


def defaults(q: Tensor, k: Tensor, scale: float | None, mean_value: bool | None) -> tuple[float, bool]:
    """What stands for a scale and a use of the mean value that were not given."""
    mean_value = q.shape[1] == k.shape[1] if mean_value is None else mean_value
    return q.shape[-1] ** -0.5 if scale is None else scale, mean_value


@torch.library.custom_op("attnopt::sparq_attention", mutates_args=())
def _sparq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_t: Tensor | None,
    v_mean: Tensor | None,
    key_padding: Tensor | None,
    rank: int,
    topk: int,
    local: int,
    scale: float,
    mean_value: bool,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    request = Request(
        q, k, v, k_t, v_mean, key_padding, rank, topk, local, scale, mean_value, starts, lengths
    )
    check(request)
    if request.is_empty:
        return request.output().zero_()
    with torch.autocast(q.device.type, enabled=False):  # it would reach inside and round the fp32 sums
        if not has_kernel(request):
            from attnopt.kernels.sparq import steps  # what runs is imported where it runs

            return steps.decode(request.masked())
        from attnopt.kernels.sparq import triton_decode

        return triton_decode.decode(request)


@_sparq.register_fake
def _(*given: Any) -> Tensor:
    request = Request(*given)
    check(request)
    return request.output()


def has_kernel(request: Request) -> bool:
    """Whether the request goes to the Triton kernels."""
    if not request.q.is_cuda or find_spec("triton") is None:
        return False
    return request.q.dtype != torch.float64 and max(request.q.shape[3], request.v.shape[3]) <= WIDEST


def _refuse_gradient(ctx: object, inputs: object, output: object) -> None:
    """Runs when an input requires grad under grad mode: refuses at the call, where the cause is, not in backward."""
    del ctx, inputs, output
    raise UnsupportedError(
        "sparq_attention has no gradient (it chooses positions, for decoding only) and an input requires grad; "
        "call it under torch.no_grad() or detach q, k and v, and train with exact attention"
    )


def _backward(ctx: object, grad: Tensor) -> None:
    _refuse_gradient(ctx, grad, None)


_sparq.register_autograd(_backward, setup_context=_refuse_gradient)
