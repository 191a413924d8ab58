"""The backward of causal linear attention on Triton: three sweeps, each with its state in fp32, each output stored once.

With dO for the gradient of the output (arXiv 2401.04658, Algorithm 2, and the state's gradient beside it):

    dq  forward over (dO, v, k): the state is S^T, starting from the initial state
    dk  reverse over (v, dO, q): the state is dS^T, starting from the final state's gradient
    dv  reverse over (k, q, dO): the state is dS; where it ends is the initial state's gradient

Every product is taken directly in the orientation in which it is needed: no accumulator is transposed to feed another
product (https://github.com/fla-org/flash-linear-attention/pull/826).
"""

import torch
from torch import Tensor

from attnopt.kernels.lightning.shapes import Gradients, sum_groups
from attnopt.kernels.lightning.triton_sweep import (
    Decay,
    Swept,
    Tiles,
    choose_tiles,
    chunk_rows,
    prepare_decay,
    processors_of,
    sweep,
)


def backward(
    d_out: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    *,
    with_log_decay: bool = False,
    tiles: Tiles | None = None,
) -> Gradients:
    """Gradients of `triton_forward.forward`; shapes and results as in `chunked.backward`. `tiles` overrides."""
    decay = prepare_decay(log_decay, tiles.chunk if tiles else chunk_rows(q.shape[2], q.dtype))
    state_t, d_state_t = (None if s is None else s.mT for s in (initial_state, d_state))
    kv_dtype = q.dtype if q.shape[1] == k.shape[1] else torch.float32
    own_q, own_k = (q, k) if with_log_decay else (None, None)
    dq = _sweep(d_out, v, k, decay, scale, tiles, entering=state_t, reverse=False, out_dtype=q.dtype, own=own_q)
    dk = _sweep(v, d_out, q, decay, scale, tiles, entering=d_state_t, reverse=True, out_dtype=kv_dtype, own=own_k)
    dv = _sweep(k, q, d_out, decay, scale, tiles, entering=d_state, reverse=True, out_dtype=kv_dtype, own=None)
    return Gradients(
        dq.out,
        sum_groups(dk.out, k.shape[1]).to(k.dtype),
        sum_groups(dv.out, v.shape[1]).to(v.dtype),
        _step_gradient(dq, dk, d_state) if with_log_decay else q.new_empty(0),
        dv.state,
    )


def _sweep(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    decay: Decay,
    scale: float,
    tiles: Tiles | None,
    *,
    entering: Tensor | None,
    reverse: bool,
    out_dtype: torch.dtype,
    own: Tensor | None,
) -> Swept:
    heads = x.shape[0] * max(x.shape[1], y.shape[1], z.shape[1])
    tiles = tiles or choose_tiles(heads, x.shape[2], x.shape[3], z.shape[3], x.dtype, processors_of(x))
    return sweep(
        x, y, z, decay=decay, scale=scale, reverse=reverse, entering=entering, out_dtype=out_dtype, own=own, tiles=tiles
    )


def _step_gradient(dq: Swept, dk: Swept, d_state: Tensor | None) -> Tensor:
    """d log_decay (B, H, S): sum over s >= t of q_s . dq_s - k_s . dk_s, plus <S_n, dS_n>; summed in fp64."""
    assert dq.row_dots is not None
    assert dk.row_dots is not None
    steps = (dq.row_dots.double() - dk.row_dots.double()).flip(-1).cumsum(-1).flip(-1)
    if d_state is not None:
        steps += (dq.state.mT * d_state).sum((-2, -1), dtype=torch.float64)[..., None]
    return steps.float()
