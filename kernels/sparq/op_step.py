"""The custom ops `attnopt::sparq_append` and `attnopt::sparq_step`, which write into the buffers of a cache."""

from typing import Any

import torch
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.kernels.sparq.append import Buffers, append, check_append
from attnopt.kernels.sparq.op import defaults, has_kernel
from attnopt.kernels.sparq.request import Request, check, check_operands


def sparq_append(
    new_k: Tensor,
    new_v: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor,
    k_t: Tensor | None = None,
    v_mean: Tensor | None = None,
    starts: Tensor | None = None,
) -> None:
    """Writes T tokens into the buffers of a cache at `lengths`, in place; `lengths` itself is the caller's to advance.

    new_k: (B, Hkv, T, D); new_v: (B, Hkv, T, Dv). k: (B, Hkv, S, D), v: (B, Hkv, S, Dv), k_t: (B, Hkv, D, S), the keys
        channel by channel; one floating dtype. All three are written.
    v_mean: (B, Hkv, Dv) fp32 (fp64 beside fp64), written: the mean of v over the positions that count.
    lengths, starts: (B,) int32 or int64, on the device of k: positions from starts (None: 0) to lengths - 1 count.

    Raises ShapeError when the operands do not fit, or when the buffers are too short (on a GPU: the device asserts).
    """
    _refuse_gradients(new_k, new_v)
    _append(new_k, new_v, k, v, k_t, v_mean, starts, lengths)


def sparq_step(
    q: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: Tensor,
    rank: int = 32,
    topk: int = 128,
    local: int = 32,
    k_t: Tensor | None = None,
    v_mean: Tensor | None = None,
    starts: Tensor | None = None,
    scale: float | None = None,
    mean_value: bool | None = None,
) -> Tensor:
    """One whole decoding step: appends a token as `sparq_append`, then attends as `sparq_attention` with the token.

    q: (B, H, 1, D); new_k: (B, Hkv, 1, D); new_v: (B, Hkv, 1, Dv); the buffers as in `sparq_append`, the choices and
    the result, (B, H, 1, Dv) in q's dtype, as in `sparq_attention`. `lengths` counts the tokens before this one and
    stays as it is, so that all layers of a model can share one tensor of lengths, advanced once a step. On a GPU the
    step is two to five launches, none of which the host waits for; a token for which there is no
    room is not written there, and on the CPU it raises.

    Raises ShapeError, OptionError and UnsupportedError as the two functions do.
    """
    check_operands(q, k, v)
    _refuse_gradients(q, new_k, new_v)
    scale, mean_value = defaults(q, k, scale, mean_value)
    out: Tensor = _step(
        q, new_k, new_v, k, v, k_t, v_mean, starts, lengths, rank, topk, local, scale, mean_value
    )
    return out


def _refuse_gradients(*inputs: Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        raise UnsupportedError(
            "a cache holds no gradients and a new token requires grad; call it under torch.no_grad(), and train with "
            "exact attention"
        )


@torch.library.custom_op("attnopt::sparq_append", mutates_args=("k", "v", "k_t", "v_mean"))
def _append(
    new_k: Tensor,
    new_v: Tensor,
    k: Tensor,
    v: Tensor,
    k_t: Tensor | None,
    v_mean: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor,
) -> None:
    buffers = Buffers(k, v, k_t, v_mean, starts, lengths)
    check_append(buffers, new_k, new_v)
    append(buffers, new_k, new_v)


@_append.register_fake
def _(new_k: Tensor, new_v: Tensor, *buffers: Any) -> None:
    check_append(Buffers(*buffers), new_k, new_v)


@torch.library.custom_op("attnopt::sparq_step", mutates_args=("k", "v", "k_t", "v_mean"))
def _step(
    q: Tensor,
    new_k: Tensor,
    new_v: Tensor,
    k: Tensor,
    v: Tensor,
    k_t: Tensor | None,
    v_mean: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor,
    rank: int,
    topk: int,
    local: int,
    scale: float,
    mean_value: bool,  # noqa: FBT001  (the schema of a custom op)
) -> Tensor:
    held = (k, v, k_t, v_mean, starts, lengths)
    request = _checked(q, new_k, new_v, *held, rank, topk, local, scale, mean_value)
    with torch.autocast(q.device.type, enabled=False):  # it would reach inside and round the fp32 sums
        if not has_kernel(request) or request.is_empty:
            from attnopt.kernels.sparq import steps  # what runs is imported where it runs

            append(Buffers(*held), new_k, new_v)
            return request.output().zero_() if request.is_empty else steps.decode(request.masked())
        from attnopt.kernels.sparq.triton_decode import decode
        from attnopt.kernels.sparq.triton_start import Token

        return decode(request, token=Token(new_k, new_v))


@_step.register_fake
def _(*given: Any) -> Tensor:
    return _checked(*given).output()


def _checked(q: Tensor, new_k: Tensor, new_v: Tensor, *given: Any) -> Request:
    """The arguments of `attnopt::sparq_step` as a request for its attention."""
    k, v, k_t, v_mean, starts, lengths, rank, topk, local, scale, mean_value = given
    request = Request(
        q, k, v, k_t, v_mean, None, rank, topk, local, scale, mean_value, starts, lengths, grown=1
    )
    check(request)
    check_append(Buffers(k, v, k_t, v_mean, starts, lengths), new_k, new_v)
    if new_k.shape[2] != 1:
        raise UnsupportedError(
            f"a step appends one token, new_k has {new_k.shape[2]}; append a prompt with sparq_append"
        )
    return request
