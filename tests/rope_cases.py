"""Causal attention with turned queries and keys, and what the paper makes of it, token by token."""

from collections.abc import Callable

import torch
from rope_spellings import Turn, rates, rotate_half
from torch import Tensor, nn

SINKS, WINDOW, N = 3, 6, 29
STREAMING = {"softmax": "streaming", "sinks": SINKS, "window": WINDOW}


class Turned(nn.Module):
    """Causal attention whose queries and keys are turned at their positions."""

    def __init__(self, turn_q: Turn, turn_k: Turn | None = None) -> None:
        super().__init__()
        self.turn_q, self.turn_k = turn_q, turn_k or turn_q

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = torch.arange(q.shape[2])
        q, k = self.turn_q(q, t), self.turn_k(k, t)
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        return (q @ k.mT * 0.4).masked_fill(hidden, -torch.inf).softmax(-1) @ v


def tensors(n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(n)
    return tuple(torch.randn(2, 2, n, 8, generator=draw, dtype=torch.float64).to(dtype) for _ in range(3))


def paper(turn: Callable[[Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """StreamingLLM token by token (arXiv 2309.17453): positions are the places in the cache."""
    rows = []
    for t in range(q.shape[2]):
        kept = [j for j in range(t + 1) if j < SINKS or j > t - WINDOW]
        places = torch.arange(len(kept))
        here, keys = turn(q[:, :, t : t + 1], places[-1:]), turn(k[:, :, kept], places)
        rows.append((here @ keys.mT * 0.4).softmax(-1) @ v[:, :, kept])
    return torch.cat(rows, 2)


def turned_in_rows(x: Tensor, t: Tensor) -> Tensor:
    """x (B, H, N, 8) turned at positions t (B or 1, N)."""
    angle = t[..., None].to(x.dtype) * rates(x)
    angle = torch.cat((angle, angle), -1)[:, None]
    return x * angle.cos() + rotate_half(x) * angle.sin()
