"""A small decoder with random weights, in plain torch: what the examples use where no weights can be installed.

It has what a Llama has (grouped heads, rotary positions, RMS norm, gated MLP), in the eager spelling of attention,
and reads bytes. Its text makes no sense; its graph does.

    attnopt explain examples/tiny.py:example
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name

NAME = "the bundled tiny model"
TEXT = Path(__file__).parent / "data" / "emma.txt"
TOKENS = 2_048

LAYERS, WIDTH, HEADS, KV_HEADS, BYTES = 4, 128, 8, 2, 256
HEAD = WIDTH // HEADS


class Attention(nn.Module):
    """Causal attention with G = H / Hkv query heads to one key/value head."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, HEADS * HEAD, bias=False)
        self.key = nn.Linear(WIDTH, KV_HEADS * HEAD, bias=False)
        self.value = nn.Linear(WIDTH, KV_HEADS * HEAD, bias=False)
        self.out = nn.Linear(HEADS * HEAD, WIDTH, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q = rotated(split(self.query(x), HEADS), angles)
        k = rotated(split(self.key(x), KV_HEADS), angles).repeat_interleave(HEADS // KV_HEADS, dim=1)
        v = split(self.value(x), KV_HEADS).repeat_interleave(HEADS // KV_HEADS, dim=1)
        position = torch.arange(x.shape[1], device=x.device)
        later = position[None, :] > position[:, None]
        scores = (q @ k.transpose(-1, -2) / HEAD**0.5).masked_fill(later, float("-inf"))
        return self.out((scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then a gated MLP, each on normed input and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.gate, self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        self.norm_1, self.norm_2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x), angles)
        y = self.norm_2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Tiny(nn.Module):
    """Bytes (B, S), int64, to logits (B, S, 256)."""

    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, BYTES, bias=False)
        self.register_buffer("frequencies", 10_000.0 ** (-torch.arange(0, HEAD, 2) / HEAD))

    def forward(self, input_ids: Tensor) -> Tensor:
        position = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = position[:, None] * self.frequencies
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, angles)
        logits: Tensor = self.head(self.norm(x))
        return logits


def split(x: Tensor, heads: int) -> Tensor:
    """(B, S, H * D) to (B, H, S, D)."""
    return x.unflatten(-1, (heads, HEAD)).transpose(1, 2)


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: x (B, H, S, D), angles (S, D / 2); pairs lie D / 2 apart."""
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def model() -> Tiny:
    """The decoder in fp32 and eval mode; the same weights each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Tiny().eval().requires_grad_(requires_grad=False)


def text_ids(tokens: int) -> Tensor:
    """The first `tokens` bytes of Austen's *Emma*: (1, tokens), int64."""
    return torch.tensor([list(TEXT.read_bytes()[:tokens])])


def decode(ids: Tensor) -> str:
    """The text of bytes (S,)."""
    return bytes(ids.tolist()).decode(errors="replace")


def example() -> tuple[Tiny, tuple[Tensor]]:
    """The model and its input: the first 2,048 bytes of *Emma*."""
    return model(), (text_ids(TOKENS),)
