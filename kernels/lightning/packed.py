"""Packed sequences on the torch path: one after the other."""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from attnopt.kernels.lightning import chunked
from attnopt.kernels.lightning.shapes import Gradients


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    starts: Tensor,
) -> tuple[Tensor, Tensor]:
    """`chunked.forward` of each sequence; shapes with B = 1, states (n, H, D, Dv). Waits for `starts` (n + 1,)."""
    found = [
        chunked.forward(
            q[:, :, rows], k[:, :, rows], v[:, :, rows], _rows(log_decay, rows), _one(initial_state, i), scale
        )
        for i, rows in enumerate(_sequences(starts))
    ]
    outs, states = zip(*found, strict=True)
    return torch.cat(outs, 2), torch.cat(states)


def backward(
    d_out: Tensor,
    d_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    starts: Tensor,
    *,
    with_log_decay: bool = False,
) -> Gradients:
    """`chunked.backward` of each sequence."""
    found = [
        chunked.backward(
            d_out[:, :, rows], _one(d_state, i), q[:, :, rows], k[:, :, rows], v[:, :, rows],
            _rows(log_decay, rows), _one(initial_state, i), scale, with_log_decay=with_log_decay,
        )
        for i, rows in enumerate(_sequences(starts))
    ]  # fmt: skip
    names = ("q", "k", "v")
    dq, dk, dv = (torch.cat([getattr(g, name) for g in found], 2) for name in names)
    steps = torch.cat([g.log_decay for g in found], -1)
    return Gradients(dq, dk, dv, steps, torch.cat([g.initial_state for g in found]))


def _sequences(starts: Tensor) -> Iterator[slice]:
    return (slice(first, end) for first, end in pairwise(starts.tolist()))


def _rows(log_decay: Tensor | None, rows: slice) -> Tensor | None:
    return log_decay if log_decay is None or log_decay.dim() == 1 else log_decay[:, :, rows]


def _one(states: Tensor | None, i: int) -> Tensor | None:
    return None if states is None else states[i : i + 1]
