"""What a loop should compute, by definition: the recurrence of linear attention, a chunk at a time, in fp64."""

from collections.abc import Mapping

import torch
from torch import Tensor

from attnopt.spec import AttentionSpec

CHUNK = 64


def recurrence(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """S_t = exp(g_t) S_{t-1} + k_t^T v_t, o_t = scale q_t S_t, from the first state on; o and the last state.

    operands: canonical, as AttentionSpec states, and "initial_state" (B, H, D, Dv) where there is one.
    """
    q, k, v = (operands[name].double() for name in "qkv")
    batch, heads, length, _ = q.shape
    state = q.new_zeros(batch, heads, q.shape[3], v.shape[3])
    if "initial_state" in operands:
        state = state + operands["initial_state"].double()
    decay = operands.get("log_decay", q.new_zeros(heads)).double()
    steps = (decay[None, :, None] if decay.dim() == 1 else decay).expand(batch, heads, length)
    out = []
    for start in range(0, length, CHUNK):
        rows = slice(start, start + CHUNK)
        o, state = _chunk(q[:, :, rows] * spec.scale, k[:, :, rows], v[:, :, rows], steps[:, :, rows], state)
        out.append(o)
    return torch.cat(out, 2), state


def _chunk(q: Tensor, k: Tensor, v: Tensor, steps: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    total = steps.cumsum(-1)
    apart = (total[..., :, None] - total[..., None, :]).tril()
    weights = (q @ k.mT) * apart.exp().tril()
    out = weights @ v + total.exp()[..., None] * (q @ state)
    last = total[..., -1:]
    return out, last.exp()[..., None] * state + (k * (last - total).exp()[..., None]).mT @ v
