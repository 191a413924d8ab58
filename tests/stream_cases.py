"""The definition of a stream for tests: the published algorithm, one token at a time, in fp64, and random histories."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnopt.caches import Rotary

Token = tuple[Tensor, Tensor, Tensor]  # q (H, D), k (Hkv, D), v (Hkv, Dv), before rotation


@dataclass(frozen=True)
class Paper:
    """arXiv 2309.17453, section 3.2: keys are cached before rotation, and rotated by their place at every step.

    After a step the oldest of what is no sink is dropped, until `most` - 1 are left for the next query to join.
    """

    sinks: int
    most: int
    rotary: Rotary | None = None
    slopes: Tensor | None = None
    scale: float = 0.3

    def outputs(self, tokens: list[Token]) -> list[Tensor]:
        kept: list[Token] = []
        out = []
        for token in tokens:
            kept.append(token)
            out.append(self.attend(kept))
            while len(kept) > self.most - 1:
                del kept[self.sinks]
        return out

    def attend(self, kept: list[Token]) -> Tensor:
        """The last of `kept` attends to all of them, each standing where it lies in the list."""
        places = torch.arange(len(kept))
        k, v = (torch.stack([token[n] for token in kept], dim=1) for n in (1, 2))
        q = kept[-1][0][:, None]
        if self.rotary is not None:
            q, k = self.turned(q, places[-1:]), self.turned(k, places)
        group = q.shape[0] // k.shape[0]
        k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
        scores = self.scale * (q @ k.mT)
        if self.slopes is not None:
            scores = scores - self.slopes[:, None, None] * (places[-1] - places)
        return (torch.softmax(scores, -1) @ v)[:, 0]

    def turned(self, x: Tensor, places: Tensor) -> Tensor:
        """Rotation as multiplication of complex numbers, feature by feature."""
        rotated = 2 * len(self.rotary.frequencies)
        halves = self.rotary.pairs == "halves"
        angle = places[:, None] * self.rotary.frequencies.double()
        turn = torch.polar(torch.full_like(angle, self.rotary.gain), angle)
        part = x[..., :rotated]
        a, b = part.chunk(2, -1) if halves else (part[..., 0::2], part[..., 1::2])
        z = torch.complex(a, b) * turn
        pair = torch.cat([z.real, z.imag], -1) if halves else torch.stack([z.real, z.imag], -1).flatten(-2)
        return torch.cat([pair, x[..., rotated:]], -1)


@dataclass
class Batch:
    """Sequences as lists of tokens, which grow by random numbers."""

    heads: int = 4
    kv_heads: int = 2
    d: int = 8
    dv: int = 6
    rows: list[list[Token]] = field(default_factory=list)

    def more(self, keep: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, ., N, .) of new tokens; where `keep` (B, N) is False there is rubbish, and no token."""
        b, n = keep.shape
        sizes = ((self.heads, self.d), (self.kv_heads, self.d), (self.kv_heads, self.dv))
        q, k, v = (torch.randn(b, h, n, d, dtype=torch.float64).to(dtype) for h, d in sizes)
        for row in range(b):
            for i in range(n):
                if keep[row, i]:
                    self.rows[row].append(
                        (q[row, :, i].double(), k[row, :, i].double(), v[row, :, i].double())
                    )
        for x in (q, k, v):
            x.mT.masked_fill_(~keep[:, None, None, :], torch.nan)
        return q, k, v

    def wanted(self, paper: Paper, keep: Tensor) -> Tensor:
        """(B, H, N, Dv): what the tokens of the last call attend to; zero where there is none."""
        out = torch.zeros(*keep.shape, self.heads, self.dv, dtype=torch.float64)
        for row, tokens in enumerate(self.rows):
            fresh = int(keep[row].sum())
            if fresh:
                out[row, keep[row]] = torch.stack(paper.outputs(tokens)[-fresh:])
        return out.permute(0, 2, 1, 3)


def keeps(batch: int, most: int) -> st.SearchStrategy[Tensor]:
    """bool (batch, N): all tokens there, or padding anywhere."""
    whole = st.integers(1, most).map(lambda n: torch.ones(batch, n, dtype=torch.bool))
    row = st.integers(1, most).flatmap(
        lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=batch, max_size=batch)
    )
    return whole | row.map(torch.tensor)
