"""Small models of four kinds, as people write them: the same attention must be found in them wherever they run."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor, nn

HEADS, KV_HEADS, D = 4, 2, 8
WIDTH, VOCABULARY = HEADS * D, 32


def split(x: Tensor, heads: int) -> Tensor:
    """(B, S, heads * D) to (B, heads, S, D)."""
    return x.view(x.shape[0], x.shape[1], heads, D).transpose(1, 2)


class RmsNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotate(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


class LlamaAttention(nn.Module):
    """Rotary positions, grouped heads, softmax in float32, an additive causal mask; `scaling` is a float attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, KV_HEADS * D, bias=False)
        self.v, self.o = nn.Linear(WIDTH, KV_HEADS * D, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.scaling = D**-0.5

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = split(self.q(x), HEADS), split(self.k(x), KV_HEADS), split(self.v(x), KV_HEADS)
        q, k = (t * cos + rotate(t) * sin for t in (q, k))
        k, v = (t[:, :, None].expand(-1, -1, HEADS // KV_HEADS, -1, -1).flatten(1, 2) for t in (k, v))
        scores = torch.matmul(q, k.transpose(2, 3)) * self.scaling + mask
        weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        return self.o(torch.matmul(weights, v).transpose(1, 2).reshape(x.shape).contiguous())


class LlamaBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = RmsNorm(), LlamaAttention()

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        return x + self.attention(self.norm(x), *rest)


class Stack(nn.Module):
    """Tokens to logits through equal blocks; the embedding is also the last projection. `wrap` calls a block."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList([block(), block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight
        self.wrap: Callable[..., Tensor] = lambda block, *args: block(*args)

    def forward(self, tokens: Tensor, *rest: Tensor) -> Tensor:
        x = self.embed(tokens)
        shared = self.shared(x, *rest)
        for block in self.blocks:
            x = self.wrap(block, x, *shared)
        return self.head(x)

    def shared(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        return rest


class Llama(Stack):
    def __init__(self) -> None:
        super().__init__(LlamaBlock)
        self.register_buffer("frequency", 100.0 ** -torch.arange(0, 1, 2 / D), persistent=False)

    def shared(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        positions = torch.arange(x.shape[1], device=x.device)
        angles = torch.cat([positions[:, None].float() * self.frequency.float()] * 2, -1)
        hidden = positions[None, :] > positions[:, None]
        lowest = torch.finfo(x.dtype).min
        mask = torch.zeros(hidden.shape, dtype=x.dtype, device=x.device).masked_fill(hidden, lowest)
        return mask[None, None], angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class BertBlock(nn.Module):
    """Scores divided by the square root of D, plus an additive mask of padded keys; dropout that does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (split(project(x), HEADS) for project in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / D**0.5
        weights = self.dropout(nn.functional.softmax(scores + mask, dim=-1))
        context = torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous()
        return self.norm(x + self.out(context.view(*context.shape[:2], WIDTH)))


class Bert(Stack):
    def __init__(self) -> None:
        super().__init__(BertBlock)

    def shared(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        (keep,) = rest
        return ((1.0 - keep[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min,)


class LinearBlock(nn.Module):
    """Causal linear attention with elu + 1, by the N x N product, scaled down to stay small."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(t, HEADS) for t in self.qkv(x).chunk(3, -1))
        weights = torch.tril((F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2)) * 0.01
        return x + self.out((weights @ v).transpose(1, 2).flatten(2))


class T5Block(nn.Module):
    """Unscaled scores plus a bias by relative distance; softmax in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.norm = RmsNorm()

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        held = self.norm(x)
        q, k, v = (split(project(held), HEADS) for project in (self.q, self.k, self.v))
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += bias
        weights = F.softmax(scores.float(), dim=-1).type_as(scores)
        return x + self.o(torch.matmul(weights, v).transpose(1, 2).contiguous().flatten(2))


class T5(Stack):
    def __init__(self) -> None:
        super().__init__(T5Block)
        self.relative = nn.Embedding(9, HEADS)

    def shared(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        positions = torch.arange(x.shape[1], device=x.device)
        distance = (positions[None, :] - positions[:, None]).clamp(-4, 4) + 4
        return (self.relative(distance).permute(2, 0, 1).unsqueeze(0).to(x.dtype),)


@dataclass(frozen=True)
class Kind:
    """A model and its inputs; spec: what each of its two sites must be read as, whatever the context."""

    make: Callable[[], Stack]
    spec: str
    padded: bool = False

    def model(self) -> Stack:
        torch.manual_seed(0)
        return self.make()

    def inputs(self, length: int = 11) -> tuple[Tensor, ...]:
        tokens = torch.arange(3 * length).remainder(7).add(3).view(3, length)
        keep = torch.arange(length)[None, :] < torch.tensor([length, length - 1, length - 4])[:, None]
        return (tokens, keep) if self.padded else (tokens,)


KINDS: dict[str, Kind] = {
    "llama": Kind(Llama, "softmax scale=0.353553 gqa=2 causal"),
    "bert": Kind(Bert, "softmax scale=0.353553 padding empty=absorbed", padded=True),
    "linear": Kind(lambda: Stack(LinearBlock), "linear scale=0.01 causal"),
    "t5": Kind(T5, "softmax scale=1 full bias"),
}
