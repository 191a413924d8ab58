"""Rotary positions (Su et al., arXiv 2104.09864) that stay exact at any distance from the start."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from attnopt.errors import OptionError, ShapeError

#: Which features turn together: c and c + R / 2, or 2c and 2c + 1, for R rotated features.
Pairs = Literal["halves", "neighbours"]


@dataclass(frozen=True, slots=True, eq=False)
class Rotary:
    """R(t): turns pair c of the first 2 * len(frequencies) features by t * frequencies[c]; the others stay.

    frequencies: float (R / 2,), radians a position; one table for all positions (plain, linear, Llama 3, YaRN). A table
    that depends on the length (dynamic NTK, LongRoPE) has no place in a stream: keys are turned once. pairs: "halves"
    (GPT-NeoX, Llama) or "neighbours" (the paper, GPT-J). gain: multiplies cos and sin (YaRN's attention factor).
    """

    frequencies: Tensor
    pairs: Pairs = "halves"
    gain: float = 1.0

    def __post_init__(self) -> None:
        if self.frequencies.dim() != 1 or not self.frequencies.is_floating_point():
            found = f"{self.frequencies.dtype} {tuple(self.frequencies.shape)}"
            raise ShapeError(f"frequencies is {found}; wanted float (R / 2,), one for each pair of features")
        if self.pairs not in {"halves", "neighbours"}:
            raise OptionError(f"pairs={self.pairs!r}; wanted 'halves' or 'neighbours'")

    @staticmethod
    def of(d: int, base: float = 10_000.0, pairs: Pairs = "halves") -> "Rotary":
        """The table of the paper for D = `d` rotated features: base ** (-2c / d)."""
        return Rotary(base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d), pairs)

    def on(self, device: torch.device) -> "Rotary":
        """The same with its table in fp64 on `device`, where a decoding step reads it without a copy."""
        return replace(self, frequencies=self.frequencies.to(device=device, dtype=torch.float64))

    def check(self, d: int) -> None:
        """Raises ShapeError if heads of `d` features are too narrow."""
        rotated = 2 * self.frequencies.shape[0]
        if rotated > d:
            raise ShapeError(f"{rotated} rotated features and heads of {d}; wanted no more than D")

    def turned(self, x: Tensor, t: Tensor) -> Tensor:
        """R(t) x in the dtype of x (B, H, N, D), for whole positions t (B, N) or (1, N), negative ones included."""
        return self.moved(x, t, self.gain)

    def moved(self, x: Tensor, by: Tensor, gain: float = 1.0) -> Tensor:
        """What was turned already, turned by `by` (B, N) positions more: R(t + by) x from R(t) x."""
        self.check(x.shape[-1])
        rotated = 2 * self.frequencies.shape[0]
        cos, sin = (part[:, None] for part in self.waves(x, by, gain))
        turning, rest = x[..., :rotated].to(cos.dtype), x[..., rotated:]
        if self.pairs == "halves":
            a, b = turning.chunk(2, dim=-1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        else:
            a, b = turning[..., 0::2], turning[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        return torch.cat([turned.to(x.dtype), rest], dim=-1)

    def waves(self, x: Tensor, t: Tensor, gain: float) -> tuple[Tensor, Tensor]:
        """cos and sin (B, N, R / 2) in fp32, in fp64 for an fp64 x. The phase is formed in fp64.

        In fp32 a phase t * w is off by up to t * w * 2^-24: a radian at 2^24 positions.
        """
        phase = t.to(torch.float64)[..., None] * self.frequencies.to(device=x.device, dtype=torch.float64)
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return (phase.cos() * gain).to(dtype), (phase.sin() * gain).to(dtype)
