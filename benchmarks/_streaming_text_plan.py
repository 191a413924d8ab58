"""How much streaming_text_gpu.py does of everything, and what with."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from _smollm2_gpu import Llama, Sizes
from torch import Tensor

Row = dict[str, Any]

#: Of the model that the paper timed.
LLAMA_2_7B = Sizes(
    layers=32, width=4096, heads=32, kv_heads=32, inner=11_008, vocabulary=32_000, base=10_000.0
)


@dataclass(frozen=True)
class Clock:
    """Counts the seconds that a part may take, from when it is made."""

    seconds: float
    begun: float = field(default_factory=time.perf_counter)

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.begun

    def over(self, share: float = 1.0) -> bool:
        """Whether this share of the time is spent."""
        return self.spent > share * self.seconds


@dataclass(frozen=True, eq=False)
class Text:
    """Tokens (N,) on the CPU, repeated without end."""

    ids: Tensor

    def at(self, positions: Tensor) -> Tensor:
        """The tokens there, in the shape of `positions`."""
        return self.ids[positions % self.ids.shape[0]]

    def piece(self, start: int, length: int, device: torch.device) -> Tensor:
        """(1, length) on the device."""
        return self.at(torch.arange(start, start + length))[None].to(device)


@dataclass(frozen=True)
class Plan:
    """How much of everything, in tokens. budget: keys that a token sees, its own included.

    compiled: both contenders of part d are, by Inductor, which takes a minute or two.
    """

    sinks: int = 4
    budget: int = 1024
    other_sinks: tuple[int, ...] = (0, 1, 2, 8)
    segment: int = 62_500
    full: int = 32_768
    windows: int = 65_536
    windows_at_once: int = 64
    total: int = 4_000_000
    bucket: int = 100_000
    decoded: int = 64
    decode_every: int = 4
    checks: int = 1000
    exact: int = 32
    fresh_at_once: int = 4
    prefill: int = 65_536
    caches: tuple[int, ...] = (1024, 2048, 4096)
    batches: tuple[int, ...] = (1, 8)
    shapes: dict[str, Sizes] = field(default_factory=lambda: {"llama-2-7b": LLAMA_2_7B})
    repeat: int = 20
    compiled: bool = False

    @property
    def window(self) -> int:
        """Beside the sinks."""
        return self.budget - self.sinks

    def reach(self, layers: int) -> int:
        """How many tokens before its own the logits of a stream depend on: each layer sees sinks and a window."""
        return self.sinks + layers * (self.window - 1)


TINY_SIZES = Sizes(layers=2, width=32, heads=4, kv_heads=2, inner=48, vocabulary=97, trained=64)
TINY = Plan(
    budget=16, other_sinks=(0,), segment=100, full=128, windows=24, windows_at_once=8, total=1000, bucket=100,
    decoded=5, checks=22, exact=4, prefill=150, caches=(16, 32), batches=(1, 2),
    shapes={"tiny": TINY_SIZES}, repeat=2,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Bench:
    """The model, the same in fp32, and the novels."""

    plan: Plan
    model: Llama
    wide: Llama
    text: Text

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.model.embedding.device


def perplexity(found: Tensor) -> float:
    """exp of the mean loss."""
    return float(found.double().mean().exp())


def curve(found: Tensor, bucket: int) -> list[float]:
    """The perplexity of each whole bucket."""
    whole = found[: found.shape[0] // bucket * bucket]
    return [perplexity(x) for x in whole.view(-1, bucket)]


def spread(x: Tensor) -> dict[str, float]:
    """Median and most."""
    return {"median": float(x.median()), "max": float(x.max())}
