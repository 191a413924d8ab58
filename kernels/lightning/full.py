"""Linear attention in which every query sees every key, without decay: two products through the state."""

from torch import Tensor

from attnopt.kernels.lightning.shapes import Gradients, repeat_heads, starting_state, state_dtype, sum_groups


def forward(
    q: Tensor, k: Tensor, v: Tensor, initial_state: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """o = scale * q S with S = S_0 + k^T v; shapes as in `chunked.forward`, but Sq and Sk may differ."""
    state = starting_state(q, v, initial_state)
    query, key, value = _whole(q, q.shape[1]), _whole(k, q.shape[1]), _whole(v, q.shape[1])
    state += key.mT @ value
    return ((query * scale) @ state).to(q.dtype), state


def backward(
    d_out: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor | None,
    scale: float,
) -> Gradients:
    """Gradients of `forward`."""
    _, state = forward(q[:, :, :0], k, v, initial_state, scale)
    query, key, value, d_o = (_whole(x, q.shape[1]) for x in (q, k, v, d_out))
    arriving = starting_state(q, v, d_state)
    arriving += (query * scale).mT @ d_o
    dq, dk, dv = scale * (d_o @ state.mT), value @ arriving.mT, key @ arriving
    return Gradients(
        dq.to(q.dtype),
        sum_groups(dk, k.shape[1]).to(k.dtype),
        sum_groups(dv, v.shape[1]).to(v.dtype),
        arriving.new_empty(0),
        arriving,
    )


def _whole(x: Tensor, heads: int) -> Tensor:
    return repeat_heads(x.to(state_dtype(x.dtype)), heads)
