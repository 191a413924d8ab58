"""Head sharing, states and gradients: what all forms of linear attention have in common."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Gradients:
    """Gradients of one call; `log_decay` is (B, H, S), for each step, or empty when nobody asked."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    initial_state: Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what sums and states are held for inputs of `dtype`: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def starting_state(q: Tensor, v: Tensor, initial_state: Tensor | None) -> Tensor:
    """A fresh (B, H, D, Dv) tensor: a copy of `initial_state`, or zeros."""
    shape = (q.shape[0], q.shape[1], q.shape[3], v.shape[3])
    fresh = q.new_zeros(shape, dtype=state_dtype(q.dtype))
    return fresh if initial_state is None else fresh.copy_(initial_state)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """(B, Hkv, ...) -> (B, H, ...): query head h reads key/value head h // (H / Hkv)."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def sum_groups(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, S, D) -> (B, Hkv, S, D): adds what the query heads of one key/value head contribute."""
    if x.shape[1] == kv_heads:
        return x
    return x.unflatten(1, (kv_heads, -1)).sum(2)
