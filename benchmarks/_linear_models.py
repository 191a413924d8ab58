"""The decoders of linear_model_gpu.py in plain PyTorch: TransNormer, the same through fla, and LLaMA; and their loss.

TransNormerLLM (Qin et al. 2023, arXiv:2307.14995, section 3) adds up v_j (q_i . k_j) exp(-slope * (i - j)) over j <= i,
spelled N x N as the paper writes it; a slope belongs to a head of a layer. LLaMA has softmax attention instead, and
fewer matrices beside it, so that its feed-forward is wider by what makes both equally large.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

#: Runs one layer on its inputs; compiled, it is one function for all layers.
RunLayer = Callable[..., Tensor]


@dataclass(frozen=True)
class Sizes:
    """inner: width of the gated feed-forward; llama_inner: that of LLaMA, with which both have as many parameters."""

    layers: int = 24
    heads: int = 8
    dim: int = 128
    inner: int = 2560
    llama_inner: int = 2880
    vocabulary: int = 65536

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return self.heads * self.dim


@dataclass(frozen=True)
class Place:
    """Where parameters are made, and in what dtype."""

    device: torch.device
    dtype: torch.dtype

    def linear(self, inputs: int, outputs: int) -> nn.Linear:
        """A matrix without bias."""
        return nn.Linear(inputs, outputs, bias=False, device=self.device, dtype=self.dtype)


class TransNormerLayer(nn.Module):
    """x (B, N, W) -> the same: gated linear attention with a decay for each head, then a gated linear unit."""

    slopes: Tensor

    def __init__(self, sizes: Sizes, index: int, place: Place) -> None:
        super().__init__()
        self.per_head = (sizes.heads, sizes.dim)
        self.project = place.linear(sizes.width, 4 * sizes.width)
        self.out = place.linear(sizes.width, sizes.width)
        self.expand = place.linear(sizes.width, 2 * sizes.inner)
        self.contract = place.linear(sizes.inner, sizes.width)
        self.register_buffer("slopes", slopes_of(sizes, index).to(place.device))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(normalised(x))
        up, gate = self.expand(normalised(x)).chunk(2, -1)
        return x + self.contract(up * gate)

    def attend(self, x: Tensor) -> Tensor:
        """silu(Q) silu(K)^T with decay, times V; normalised over all heads, and gated."""
        q, k, v, gate = self.project(x).chunk(4, -1)
        q, k = functional.silu(q), functional.silu(k)
        mixed = self.mix(*(y.unflatten(-1, self.per_head) for y in (q, k, v)))
        return self.out(normalised(mixed.flatten(2)) * gate)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """All (B, N, H, D). Every pair of tokens, as the paper spells it; the decay is computed here."""
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        at = torch.arange(q.shape[2], device=q.device)
        distance = at[:, None] - at[None, :]
        decay = torch.exp(-self.slopes[:, None, None] * distance).masked_fill(distance < 0, 0.0)
        return ((q @ k.mT * decay.to(q.dtype)) @ v).transpose(1, 2)


class FlaLayer(TransNormerLayer):
    """The same layer, with fla's kernel called by hand. Raises ImportError where fla is missing."""

    def __init__(self, sizes: Sizes, index: int, place: Place) -> None:
        from fla.ops.simple_gla import chunk_simple_gla

        super().__init__(sizes, index, place)
        self.kernel = chunk_simple_gla

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mixed: Tensor = self.kernel(q, k, v, g_gamma=-self.slopes, scale=1.0)[0]
        return mixed


class LlamaLayer(nn.Module):
    """x (B, N, W), cosines and sines (N, D) of the positions -> as x: causal softmax attention, then SwiGLU."""

    def __init__(self, sizes: Sizes, index: int, place: Place) -> None:
        del index
        super().__init__()
        self.per_head = (sizes.heads, sizes.dim)
        self.project = place.linear(sizes.width, 3 * sizes.width)
        self.out = place.linear(sizes.width, sizes.width)
        self.expand = place.linear(sizes.width, 2 * sizes.llama_inner)
        self.contract = place.linear(sizes.llama_inner, sizes.width)
        self.gains = nn.Parameter(torch.ones(2, sizes.width, device=place.device, dtype=place.dtype))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        q, k, v = self.project(normalised(x) * self.gains[0]).unflatten(-1, (3, *self.per_head)).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (rotated(q, cosine, sine), rotated(k, cosine, sine), v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        up, gate = self.expand(normalised(x) * self.gains[1]).chunk(2, -1)
        return x + self.contract(up * functional.silu(gate))


class Decoder(nn.Module):
    """ids (B, N) -> the last layer's output (B, N, W), normalised. Each layer is checkpointed while training."""

    def __init__(self, layer: type[nn.Module], sizes: Sizes, place: Place) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.width, device=place.device, dtype=place.dtype)
        self.layers = nn.ModuleList(layer(sizes, index, place) for index in range(sizes.layers))
        self.turns = layer is LlamaLayer
        self.apply(start)

    def forward(self, ids: Tensor, run_layer: RunLayer) -> Tensor:
        x = self.embedding(ids) * self.sizes.width**0.5
        beside = rotation(ids.shape[1], self.sizes.dim, x) if self.turns else ()
        for layer in self.layers:
            x = checkpoint(run_layer, layer, x, *beside, use_reentrant=False, preserve_rng_state=False)
        return normalised(x)


def call_layer(layer: nn.Module, *inputs: Tensor) -> Tensor:
    """What is compiled: a layer is an argument, so that one compilation serves them all."""
    result: Tensor = layer(*inputs)
    return result


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """hidden (T, W), weight (vocabulary, W), targets (T,) -> the sum of the losses, in fp32."""
    return functional.cross_entropy((hidden @ weight.mT).float(), targets, reduction="sum")


def chunked_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    run: Callable[..., Tensor] = cross_entropy_sum,
) -> Tensor:
    """Mean cross-entropy of (B, N, W) against (B, N); the logits of only `chunk` tokens exist at a time."""
    pieces = zip(hidden.flatten(0, 1).split(chunk), targets.flatten().split(chunk), strict=True)
    sums = [checkpoint(run, h, weight, t, use_reentrant=False, preserve_rng_state=False) for h, t in pieces]
    return torch.stack(sums).sum() / targets.numel()


def batches(length: int, tokens: int, sizes: Sizes, device: str) -> Iterator[Tensor]:
    """Ids (tokens / N, N) without end, the same in each call: the n-th most frequent one comes with a weight of 1/n."""
    generator = torch.Generator().manual_seed(0)
    weights = 1.0 / torch.arange(1, sizes.vocabulary + 1)
    while True:
        ids = torch.multinomial(weights, tokens, replacement=True, generator=generator)
        yield ids.view(-1, length).to(device)


def normalised(x: Tensor) -> Tensor:
    """SRMSNorm: x / rms(x) without weights, in fp32 inside."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def slopes_of(sizes: Sizes, index: int) -> Tensor:
    """(H,) fp32: ALiBi's slopes, flatter in each layer and all but 0 in the last (TransNormerLLM's code)."""
    alibi = 2.0 ** (-8.0 * torch.arange(1, sizes.heads + 1) / sizes.heads)
    return alibi * (1 - index / max(1, sizes.layers - 1) + 1e-5)


def rotation(length: int, dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, D) of RoPE, the two halves alike; in the dtype of `like`."""
    rate = 10000.0 ** (-torch.arange(0, dim, 2, device=like.device) / dim)
    angle = torch.arange(length, device=like.device)[:, None] * rate
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """(B, N, H, D) turned by its position, halves against each other."""
    first, second = x.chunk(2, -1)
    return x * cosine[:, None] + torch.cat((-second, first), -1) * sine[:, None]


def start(module: nn.Module) -> None:
    """Small normal weights, as language models start with."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def parameters_of(model: nn.Module) -> int:
    """How many there are; the embedding is used again for the logits and counts once."""
    return sum(p.numel() for p in model.parameters())
