"""The custom ops `attnopt::lightning_attention` (differentiable) and `lightning_step`, and their public faces."""

from importlib.util import find_spec
from typing import Any, Literal, overload

import torch
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.kernels._once import differentiable_once
from attnopt.kernels.lightning import chunked, full, packed
from attnopt.kernels.lightning.checks import check_attention, check_step
from attnopt.kernels.lightning.shapes import Gradients, state_dtype

#: The widest head whose state tile the Triton kernels hold in registers; wider ones take the torch path.
WIDEST = 256


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: Literal[False] = False,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor: ...


@overload
def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: Literal[True],
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]: ...


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Linear attention with scalar decay (Lightning Attention-2, arXiv 2401.04658, Algorithms 1 and 2), in O(N).

        S_t = exp(log_decay_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

    q: (B, H, Sq, D); k: (B, Hkv, Sk, D); v: (B, Hkv, Sk, Dv); all fp64, fp32, bf16 or fp16 with any strides. H is a
        multiple of Hkv, and head h reads key/value head h // (H / Hkv).
    log_decay: None (no decay), (H,) one per head, or (B, H, Sq) one per step, applied before that step's key is added.
        Natural logarithm, <= 0, never a positive slope; values are not checked. -inf forgets everything.
    scale: multiplies q . k; it is 1, not D ** -0.5, unless given.
    initial_state: (B, H, D, Dv), the state before the first token, one per query head; fp32 (fp64 for fp64).
    return_state: whether the state after the last token is returned too, in the form of `initial_state`.
    causal: query t sees keys <= t, and Sq == Sk. False: every query sees every key, Sq and Sk are free, no decay.
    cu_seqlens: None, or (n + 1,) int32 or int64 on q's device: n sequences lie one behind the other along S, B is 1,
        and sequence i has the rows from cu_seqlens[i] to cu_seqlens[i + 1]; the first is 0, the last S, none decreases
        (values are not checked). States are then (n, H, D, Dv). Causal only.

    Returns o (B, H, Sq, Dv) in q's dtype, contiguous; with `return_state` (o, state). Sums and states are held in fp32
    (fp64 for fp64). Differentiable once in q, k, v, log_decay and initial_state, through o and the state.
    Deterministic. On CUDA Triton kernels serve causal fp32, bf16 and fp16 with D and Dv <= 256; all else takes the
    torch path.

    Raises ShapeError (operands do not fit) and UnsupportedError (decay without causal order, integer dtypes).
    """
    o, state = _attention(q, k, v, log_decay, initial_state, scale, causal, cu_seqlens, return_state)
    return (o, state) if return_state else o


def lightning_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, log_decay: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """One token of causal `lightning_attention`; updates `state` in place.

    q: (B, H, D); k: (B, Hkv, D); v: (B, Hkv, Dv); state: (B, H, D, Dv) fp32 (fp64 for fp64), any strides without
    overlap; log_decay: None, (H,) or (B, H), natural logarithm, <= 0. Returns o (B, H, Dv) in q's dtype.

    Raises ShapeError (operands do not fit) and UnsupportedError (gradients: the old state is gone; use no_grad).
    """
    given = (q, k, v, state, log_decay)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        raise UnsupportedError(
            "lightning_step overwrites its state and has no gradient, and an input requires grad; "
            "call it under torch.no_grad(), or train through lightning_attention(..., return_state=True)"
        )
    out: Tensor = _step(q, k, v, state, log_decay, scale)
    return out


@torch.library.custom_op("attnopt::lightning_attention", mutates_args=())
def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    cu_seqlens: Tensor | None,
    with_state: bool,
) -> tuple[Tensor, Tensor]:
    """o and the last state, empty unless asked for: for short sequences it is much of what is written."""
    check_attention(q, k, v, log_decay, initial_state, cu_seqlens, causal=causal)
    inputs = (q, k, v, log_decay, initial_state, scale)
    with torch.autocast(q.device.type, enabled=False):
        if causal and _has_kernel(q, k, v):
            from attnopt.kernels.lightning import triton_forward

            return triton_forward.forward(*inputs, cu_seqlens, with_state=with_state)
        if not causal:
            out, state = full.forward(q, k, v, initial_state, scale)
        elif cu_seqlens is None:
            out, state = chunked.forward(*inputs)
        else:
            out, state = packed.forward(*inputs, cu_seqlens)
        return out, state if with_state else state.new_empty(0)


@_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    cu_seqlens: Tensor | None,
    with_state: bool,
) -> tuple[Tensor, Tensor]:
    del scale
    check_attention(q, k, v, log_decay, initial_state, cu_seqlens, causal=causal)
    state = _new_state(q, v, cu_seqlens)
    return q.new_empty((*q.shape[:3], v.shape[3])), state if with_state else state.new_empty(0)


@torch.library.custom_op("attnopt::lightning_attention_backward", mutates_args=())
def _attention_backward(
    d_out: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    with_log_decay: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (empty unless asked for) and initial_state (empty unless there is one)."""
    inputs = (d_out, d_state, q, k, v, log_decay, initial_state, scale)
    with torch.autocast(q.device.type, enabled=False):
        if not causal:
            found = full.backward(d_out, d_state, q, k, v, initial_state, scale)
        elif _has_kernel(q, k, v):
            from attnopt.kernels.lightning import triton_backward

            found = triton_backward.backward(*inputs, cu_seqlens, with_log_decay=with_log_decay)
        elif cu_seqlens is None:
            found = chunked.backward(*inputs, with_log_decay=with_log_decay)
        else:
            found = packed.backward(*inputs, cu_seqlens, with_log_decay=with_log_decay)
        return _as_tuple(found, log_decay, initial_state)


@_attention_backward.register_fake
def _(
    d_out: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    causal: bool,
    with_log_decay: bool,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    del d_out, d_state, scale, causal
    state = _new_state(q, v, cu_seqlens)
    if initial_state is None:
        state = state.new_empty(0)
    decay = state.new_empty(0)
    if with_log_decay and log_decay is not None:
        decay = log_decay.new_empty(log_decay.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), decay, state


def _save(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    del output
    *tensors, ctx.scale, ctx.causal, cu_seqlens, _ = inputs
    ctx.save_for_backward(*tensors, cu_seqlens)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, d_out: Tensor | None, d_state: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, initial_state, cu_seqlens = ctx.saved_tensors
    if d_state is not None and not d_state.numel():
        d_state = None  # of a state that nobody asked for
    if d_out is None:
        d_out = q.new_zeros((*q.shape[:3], v.shape[3]))
    with_log_decay = ctx.needs_input_grad[3]
    dq, dk, dv, d_decay, d_initial = _attention_backward(
        d_out, d_state, q, k, v, log_decay, initial_state, ctx.scale, ctx.causal, with_log_decay, cu_seqlens
    )
    d_decay = d_decay if with_log_decay else None
    return dq, dk, dv, d_decay, d_initial if initial_state is not None else None, *[None] * 4


_attention.register_autograd(_differentiate, setup_context=_save)
differentiable_once(_attention_backward, "lightning")


@torch.library.custom_op("attnopt::lightning_step", mutates_args=("state",))
def _step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
    check_step(q, k, v, state, log_decay)
    with torch.autocast(q.device.type, enabled=False):
        if not _has_kernel(q, k, v):
            return chunked.step(q, k, v, state, log_decay, scale)
        from attnopt.kernels.lightning import triton_step

        return triton_step.step(q, k, v, state, log_decay, scale)


@_step.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None, scale: float) -> Tensor:
    del scale
    check_step(q, k, v, state, log_decay)
    return q.new_empty((*q.shape[:2], v.shape[2]))


def _has_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the Triton kernels take these tensors, none of them empty."""
    if not q.is_cuda or find_spec("triton") is None:
        return False
    fits = q.dtype != torch.float64 and max(q.shape[-1], v.shape[-1]) <= WIDEST
    return fits and q.numel() * k.numel() * v.numel() > 0


def _new_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty((sequences, q.shape[1], q.shape[3], v.shape[3]), dtype=state_dtype(q.dtype))


def _as_tuple(
    grads: Gradients, log_decay: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As the op returns them: what the steps of one head share is added up where log_decay is (H,)."""
    d_decay, d_initial = grads.log_decay, grads.initial_state
    if log_decay is not None and d_decay.dim() == 3:
        d_decay = (d_decay.sum((0, 2)) if log_decay.dim() == 1 else d_decay).to(log_decay.dtype)
    return (
        grads.q,
        grads.k,
        grads.v,
        d_decay,
        d_initial if initial_state is not None else d_initial.new_empty(0),
    )
