"""Linear attention as loops, in chunks and through running sums: spellings, each with what it should be read as."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from attnopt.mask import Causal
from attnopt.spec import AttentionSpec, Decay, Precision

B, H, S, D, E, C = 2, 3, 24, 4, 5, 8


def tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A token at a time, the output written at its place; (B, S, H, D)."""
    out, state = v.new_zeros(v.shape), q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    for t in range(q.shape[1]):
        state = state + torch.einsum("bhd,bhe->bhde", k[:, t], v[:, t])
        out[:, t] = torch.einsum("bhd,bhde->bhe", q[:, t] * 0.5, state)
    return out


def gated_tokens(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """A token at a time with a gate for each, products spelled out; (B, H, S, D), g (B, H, S)."""
    rows, state = [], torch.zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3], dtype=q.dtype)
    for t in range(q.shape[2]):
        state = state * g[:, :, t].exp()[..., None, None] + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(
            -2
        )
        rows.append((q[:, :, t].unsqueeze(-1) * state).sum(-2))
    return torch.stack(rows, 2)


def retention_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A token at a time with a constant decay for each head that the graph computes."""
    gamma = 1 - torch.exp2(-2 - torch.arange(q.shape[1], dtype=q.dtype))
    rows, state = [], 0.0
    for t in range(q.shape[2]):
        state = gamma.view(1, -1, 1, 1) * state + k[:, :, t : t + 1].mT @ v[:, :, t : t + 1]
        rows.append(q[:, :, t : t + 1] @ state)
    return torch.cat(rows, 2)


def blocks(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
    """Lightning Attention by blocks, the last one shorter; slope (H, 1, 1)."""
    return torch.cat(list(_blocks(q, k, v, slope)[0]), 2)


def blocks_with_state(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and the state after the last block."""
    rows, state = _blocks(q, k, v, slope)
    return torch.cat(rows, 2), state


def _blocks(q: Tensor, k: Tensor, v: Tensor, slope: Tensor, size: int = C) -> tuple[list[Tensor], Tensor]:
    rows, state = [], q.new_zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3])
    for start in range(0, q.shape[2], size):
        now = slice(start, min(start + size, q.shape[2]))
        m = now.stop - start
        place = torch.arange(1, m + 1, dtype=q.dtype)
        apart = place[:, None] - place[None, :]
        decay = torch.where(apart >= 0, torch.exp(-slope * apart.clamp_min(0)), 0.0)
        inner = (q[:, :, now] @ k[:, :, now].mT * decay) @ v[:, :, now]
        rows.append(inner + (q[:, :, now] * torch.exp(-slope * place[:, None])) @ state)
        fading = k[:, :, now] * torch.exp(-slope * (m - place[:, None]))
        state = state * torch.exp(-slope * m) + fading.mT @ v[:, :, now]
    return rows, state


def step(q: Tensor, k: Tensor, v: Tensor, state: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Decoding: a few tokens from a state that is kept; q (B, H, few, D)."""
    rows = []
    for t in range(q.shape[2]):
        state = torch.exp(-slope) * state + k[:, :, t : t + 1].transpose(-1, -2) @ v[:, :, t : t + 1]
        rows.append(q[:, :, t : t + 1] @ state)
    return torch.cat(rows, dim=-2), state


def summed_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Chunks whose states are a running sum, shifted by one; (B, S, H, D)."""
    b, s, h, _ = q.shape
    q, k, v = (x.reshape(b, s // C, C, h, -1).permute(0, 3, 1, 2, 4) for x in (q, k, v))
    states = (k.transpose(-1, -2) @ v).cumsum(2)
    before = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
    later = torch.ones(C, C, dtype=torch.bool).triu(1)
    out = q @ before + (q @ k.transpose(-1, -2)).masked_fill(later, 0) @ v
    return out.permute(0, 2, 3, 1, 4).reshape(b, s, h, -1)


def gated_chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Chunks with a gate for each token, the state handed on in a loop over chunks; (B, H, S, D)."""
    b, h, s, _ = q.shape
    q, k, v = (x.reshape(b, h, s // C, C, -1) for x in (q, k, v))
    total = g.reshape(b, h, s // C, C).cumsum(-1)
    pairs = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
    out, state = torch.zeros_like(v), k.new_zeros(b, h, k.shape[-1], v.shape[-1])
    for n in range(s // C):
        inner = (q[:, :, n] @ k[:, :, n].mT * pairs[:, :, n]) @ v[:, :, n]
        out[:, :, n] = inner + (q[:, :, n] * total[:, :, n, :, None].exp()) @ state
        left = (total[:, :, n, -1, None] - total[:, :, n]).exp()[..., None]
        state = state * total[:, :, n, -1, None, None].exp() + (k[:, :, n] * left).mT @ v[:, :, n]
    return out.reshape(b, h, s, -1)


def _segments(x: Tensor) -> Tensor:
    """Sums of x over all stretches, -inf above the diagonal."""
    n = x.size(-1)
    spread = x[..., None].expand(*x.shape, n).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(-1), 0)
    return spread.cumsum(-2).masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf)


def state_space_dual(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Mamba-2 by chunks, states handed on by a product with a matrix of decays; (B, S, H, D), g (B, S, H)."""
    b, s, h, _ = q.shape
    q, k, v = (x.reshape(b, s // C, C, h, -1) for x in (q, k, v))
    g = g.reshape(b, s // C, C, h).permute(0, 3, 1, 2)
    total = g.cumsum(-1)
    inner = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", q, k, torch.exp(_segments(g)), v)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", k, torch.exp(total[..., -1:] - total), v)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
    between = torch.exp(_segments(F.pad(total[..., -1], (1, 0))))
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)[:, :-1]
    return (inner + torch.einsum("bclhn,bchpn,bhcl->bclhp", q, states, torch.exp(total))).reshape(b, s, h, -1)


def running_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A running sum of all outer products (Performer); (B, H, S, D)."""
    states = torch.einsum("...nd,...ne->...nde", k, v).cumsum(dim=-3)
    return torch.einsum("...nde,...nd->...ne", states, q)


@dataclass(frozen=True)
class Spelling:
    """name, function, and what its one site is read as."""

    attend: Callable[..., Any]
    inputs: Callable[[], list[Tensor]]
    scale: float = 1.0
    decay: Decay = Decay.NONE
    extra: dict[str, bool] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.attend.__name__

    @property
    def spec(self) -> AttentionSpec:
        held = Precision(scores=torch.float32, out=torch.float32)
        return AttentionSpec(
            "linear", self.scale, mask=Causal(), decay=self.decay, precision=held, **self.extra
        )


def by_position(length: int = S) -> list[Tensor]:
    """q, k, v as (B, S, H, D)."""
    return [torch.randn(B, length, H, n) for n in (D, D, E)]


def by_head(length: int = S) -> list[Tensor]:
    """q, k, v as (B, H, S, D)."""
    return [torch.randn(B, H, length, n) for n in (D, D, E)]


def gates() -> Tensor:
    return -torch.rand(B, H, S)


def slopes() -> Tensor:
    return torch.tensor([0.8, 0.1, 0.01]).view(H, 1, 1)


SPELLINGS = [
    Spelling(tokens, by_position, 0.5),
    Spelling(gated_tokens, lambda: [*by_head(), gates()], decay=Decay.PER_TOKEN),
    Spelling(retention_tokens, by_head, decay=Decay.PER_HEAD),
    Spelling(blocks, lambda: [*by_head(21), slopes()], decay=Decay.PER_HEAD),
    Spelling(blocks_with_state, lambda: [*by_head(), slopes()], decay=Decay.PER_HEAD, extra={"final_state": True}),
    Spelling(
        step, lambda: [*by_head(5), torch.randn(B, H, D, E), slopes()], decay=Decay.PER_HEAD,
        extra={"initial_state": True, "final_state": True},
    ),
    Spelling(summed_chunks, by_position),
    Spelling(gated_chunks, lambda: [*by_head(), gates()], decay=Decay.PER_TOKEN),
    Spelling(state_space_dual, lambda: [*by_position(), gates().transpose(1, 2)], decay=Decay.PER_TOKEN),
    Spelling(running_sums, by_head),
]  # fmt: skip
