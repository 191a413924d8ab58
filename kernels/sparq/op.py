"""The custom op `attnopt::sparq_attention`: one decoding step, forward only."""

from importlib.util import find_spec

import torch
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.kernels.sparq import steps
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

    The `rank` channels in which the query is largest score all positions; the `topk` best are attended to exactly;
    the mean value stands for the rest.

    q: (B, H, 1, D); k: (B, Hkv, Sk, D); v: (B, Hkv, Sk, Dv); all fp32, bf16 or fp16 (fp64 runs in torch). H is a
        multiple of Hkv: heads of a group share channels (largest sum of |q|) and positions (largest sum of scores).
    rank: channels read, r; more than D means D.
    topk: positions attended to, k. With topk >= Sk this is exact attention.
    local: how many of the last kept positions are always among the topk.
    k_t: (B, Hkv, D, Sk), the keys stored channel by channel. With it a step reads rank * Sk + topk * (D + Dv)
        elements per key/value head; without it the channels are picked out of k, which touches nearly all of k
        and saves no memory traffic.
    v_mean: (B, Hkv, Dv), the mean of v over the kept positions, as fp32; computed when None, which reads all of v.
    scale: multiplies q . k; None means D ** -0.5. The approximate logits stand for the same scale.
    key_padding: (B, Sk) bool, True = keep. What padded keys and values hold never reaches the output.
    mean_value: whether the mean value takes the weight of the positions left out; None: only when H == Hkv,
        as the authors do.
    starts, lengths: (B,) int32 or int64: the buffers of a cache count from starts (None: 0) to lengths - 1 (None: Sk).
        Together with key_padding, a position counts when both say so.

    Returns (B, H, 1, Dv) in q's dtype, contiguous. Rows with no key (all padded, or Sk = 0) are zero. Sums are held in
    fp32. Among equal channels or positions the lower index is chosen, so the result is deterministic.

    Raises ShapeError (operands do not fit), OptionError (rank, topk or local cannot be) and UnsupportedError (more
    than one query; or gradients: the choice of positions has no derivative, call it under torch.no_grad()).
    """
    check_operands(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mean_value = q.shape[1] == k.shape[1] if mean_value is None else mean_value
    out: Tensor = _sparq(
        q, k, v, k_t, v_mean, key_padding, rank, topk, local, scale, mean_value, starts, lengths
    )
    return out


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
            return steps.decode(request.masked())
        from attnopt.kernels.sparq import triton_decode

        return triton_decode.decode(request)


@_sparq.register_fake
def _(
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
