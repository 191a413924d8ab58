"""The backward of causal linear attention on Triton: three sweeps, states in fp32, each gradient stored once.

With dO for the gradient of the output (arXiv 2401.04658, Algorithm 2, and the state's gradient beside it):

    dq  forward over (dO, v, k): the state is S^T, starting from the initial state
    dk  reverse over (v, dO, q): the state is dS^T, starting from the final state's gradient
    dv  reverse over (k, q, dO): the state is dS; where it ends is the initial state's gradient

Every product is taken directly in the orientation in which it is needed: no accumulator is transposed to feed another
product (https://github.com/fla-org/flash-linear-attention/pull/826).
"""

from dataclasses import replace
from functools import partial

import torch
import triton
from torch import Tensor

from attnopt.kernels._triton import bind_context
from attnopt.kernels.lightning.shapes import Gradients, sum_groups
from attnopt.kernels.lightning.triton_decay import empty_terms, prepare_decay
from attnopt.kernels.lightning.triton_launch import Sweep, entering_states, prepare_sweep, run_sweep
from attnopt.kernels.lightning.triton_tiles import WIDEST, WIDEST_WITH_TERMS, Tiles, chunk_rows


def backward(
    d_out: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    starts: Tensor | None = None,
    *,
    with_log_decay: bool = False,
    tiles: Tiles | None = None,
) -> Gradients:
    """Gradients of `triton_forward.forward`; shapes and results as in `chunked.backward`. `tiles` overrides.

    The gradient of an initial state that is not there is empty.
    """
    bind_context(q)
    chunk = tiles.chunk if tiles else chunk_rows(q.shape[2], max(q.shape[3], v.shape[3]), q.dtype)
    decay = prepare_decay(log_decay, chunk, starts)
    prepare = partial(prepare_sweep, decay=decay, scale=scale, tiles=tiles, starts=starts)
    state_t, d_state_t = (None if s is None else s.mT for s in (initial_state, d_state))
    kv_dtype = q.dtype if q.shape[1] == k.shape[1] else torch.float32
    widest = WIDEST_WITH_TERMS if with_log_decay else WIDEST
    to_q = prepare(d_out, v, k, reverse=False, widest=widest)
    to_k = prepare(v, d_out, q, reverse=True, widest=widest)
    to_v = prepare(k, q, d_out, reverse=True)
    if with_log_decay:
        to_q, to_k = _with_terms(to_q, to_k, q, k)
    dq = run_sweep(to_q, entering_states(to_q, state_t), q.dtype, with_state=False)
    entering = entering_states(to_k, d_state_t)
    dk = run_sweep(to_k, entering, kv_dtype, with_state=False)
    entering = _as_entered(to_v, entering, d_state)
    dv = run_sweep(to_v, entering, kv_dtype, with_state=initial_state is not None)
    return Gradients(
        dq.out,
        sum_groups(dk.out, k.shape[1]).to(k.dtype),
        sum_groups(dv.out, v.shape[1]).to(v.dtype),
        q.new_empty(0) if to_q.terms is None else to_q.terms.rows.sum((0, 1)),
        dv.state,
    )


def _with_terms(to_q: Sweep, to_k: Sweep, q: Tensor, k: Tensor) -> tuple[Sweep, Sweep]:
    """The sweeps of dq and dk such that they leave, between them, the terms of d log_decay."""
    slices = triton.cdiv(q.shape[3], to_q.tiles.columns)
    packed = 0 if to_q.starts is None else to_q.sequences
    terms = empty_terms(q, to_k.x, slices, to_q.tiles.chunk, packed)
    return replace(to_q, own=q, terms=terms), replace(to_k, own=k, terms=terms)


def _as_entered(to_v: Sweep, entering: Tensor | None, d_state: Tensor | None) -> Tensor | None:
    """The states of dk, turned, are those of dv, where both sweeps have the same segments."""
    if entering is not None and entering.shape[2] == to_v.segments:
        return entering.mT
    return entering_states(to_v, d_state)
