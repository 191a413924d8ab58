"""SmolLM2-135M in plain torch, read from the parts that `_smollm2_pack.py` writes: needs no transformers and no gguf.

    model = load(folder, torch.device("cuda"), torch.bfloat16)
    logits = model(ids)                                    # (B, N) int64 -> (B, N, vocabulary), causal attention
    logits = model(ids, attention)                         # attention(q, k, v, layer) -> (B, H, N, D)
    model.attention = attention                            # the same for all calls

An attention function is called once a layer, in order, with q (B, H, N, D) and k, v (B, Hkv, N, D), all *before* they
are rotated, and the number of the layer; `model.rotary` rotates: a cache has positions of its own. So StreamingCache:

    cache = StreamingCache(sinks=4, window=1020, rotary=model.rotary)
    logits = model(ids, lambda q, k, v, layer: cache.attend(q, k, v, layer=layer))
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from attnopt.caches import Rotary

#: All six novels, where the parts are: uint16.
TEXT = "austen.npy"
#: What a part consists of.
BLOCKS, LISTED = "blocks.bin", "tensors.json"

#: q (B, H, N, D), k, v (B, Hkv, N, D), all before rotation, and the layer's number, to (B, H, N, D).
Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Sizes:
    """Of a Llama; the defaults are SmolLM2-135M's. trained: positions that it has seen."""

    layers: int = 30
    width: int = 576
    heads: int = 9
    kv_heads: int = 3
    inner: int = 1536
    vocabulary: int = 49_152
    base: float = 100_000.0
    epsilon: float = 1e-5
    trained: int = 8192

    @property
    def head(self) -> int:
        """D."""
        return self.width // self.heads

    @property
    def projected(self) -> tuple[int, int, int]:
        """Rows of the projections to queries, keys and values, which are one matrix."""
        return self.width, self.kv_heads * self.head, self.kv_heads * self.head


SIZES = Sizes()


@dataclass(frozen=True, eq=False)
class Layer:
    """norms (W,); project (W + 2 Hkv D, W): q, k, v; out (W, W); expand (2 I, W): gate, up; contract (W, I)."""

    norm: Tensor
    project: Tensor
    out: Tensor
    norm_inner: Tensor
    expand: Tensor
    contract: Tensor


@dataclass(eq=False)
class Llama:
    """ids (B, N) int64 -> logits (B, N, vocabulary) in the dtype of the weights. The embedding is the head as well.

    attention: see the module's first lines; causal, from position 0, unless it is replaced. before, after: what a
    layer does around attention, in one place so that both can be compiled (`compiled`).
    """

    sizes: Sizes
    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    rotary: Rotary = field(init=False)
    attention: Attention = field(init=False)
    before: Callable[..., Tensor] = field(init=False)
    after: Callable[..., Tensor] = field(init=False)

    def __post_init__(self) -> None:
        rotary = Rotary.of(self.sizes.head, self.sizes.base)
        self.rotary = rotary.on(self.embedding.device)
        self.attention = causal(self.rotary)
        self.before, self.after = taken_in, given_out

    def __call__(self, ids: Tensor, attention: Attention | None = None) -> Tensor:
        return self.logits(self.hidden(ids, attention))

    @torch.no_grad()
    def hidden(self, ids: Tensor, attention: Attention | None = None) -> Tensor:
        """(B, N, W): what the head reads, normalised."""
        attend, epsilon = attention or self.attention, self.sizes.epsilon
        x = functional.embedding(ids, self.embedding)
        for number, layer in enumerate(self.layers):
            mixed = attend(*self._heads(self.before(x, layer.norm, layer.project, epsilon)), number)
            rest = (layer.out, layer.norm_inner, layer.expand, layer.contract, epsilon)
            x = self.after(x, mixed.transpose(1, 2).flatten(2), *rest)
        return functional.rms_norm(x, x.shape[-1:], self.norm, epsilon)

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """(..., W) to (..., vocabulary)."""
        return hidden @ self.embedding.mT

    def tensors(self) -> Iterator[Tensor]:
        """All weights, in one order for all models of a size."""
        yield from (self.embedding, self.norm)
        for layer in self.layers:
            yield from vars(layer).values()

    def compiled(self) -> "Llama":
        """The same, with what is not attention fused by Inductor: one compilation for all layers."""
        other = Llama(self.sizes, self.embedding, self.layers, self.norm)
        other.attention = self.attention
        other.before = torch.compile(taken_in, dynamic=False)
        other.after = torch.compile(given_out, dynamic=False)
        return other

    def _heads(self, projected: Tensor) -> Iterator[Tensor]:
        parts = projected.split(self.sizes.projected, dim=-1)
        return (part.unflatten(-1, (-1, self.sizes.head)).transpose(1, 2) for part in parts)


def taken_in(x: Tensor, norm: Tensor, project: Tensor, epsilon: float) -> Tensor:
    """x (B, N, W) to q, k and v side by side."""
    return functional.rms_norm(x, x.shape[-1:], norm, epsilon) @ project.mT


def given_out(
    x: Tensor, mixed: Tensor, out: Tensor, norm: Tensor, expand: Tensor, contract: Tensor, epsilon: float
) -> Tensor:
    """x (B, N, W) and what attention made of it, to the next layer's x."""
    x = x + mixed @ out.mT
    gate, up = (functional.rms_norm(x, x.shape[-1:], norm, epsilon) @ expand.mT).chunk(2, dim=-1)
    return x + (functional.silu(gate) * up) @ contract.mT


def causal(rotary: Rotary) -> Attention:
    """Full causal attention over the text given, whose first token stands at position 0."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        del layer
        at = torch.arange(q.shape[2], device=q.device)[None]
        q, k = rotary.turned(q, at), rotary.turned(k, at)
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return attend


def random_model(sizes: Sizes, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Llama:
    """Small normal weights: for tests, and for latencies, which do not depend on the values."""
    torch.manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(std=shape[-1] ** -0.5)

    def layer() -> Layer:
        norm = torch.ones(sizes.width, device=device, dtype=dtype)
        project, out = normal(sum(sizes.projected), sizes.width), normal(sizes.width, sizes.width)
        expand, contract = normal(2 * sizes.inner, sizes.width), normal(sizes.width, sizes.inner)
        return Layer(norm, project, out, norm, expand, contract)

    norm = torch.ones(sizes.width, device=device, dtype=dtype)
    return Llama(sizes, normal(sizes.vocabulary, sizes.width), [layer() for _ in range(sizes.layers)], norm)


# Reading.


def load(folder: Path, device: torch.device, dtype: torch.dtype, sizes: Sizes = SIZES) -> Llama:
    """The model from the parts in `folder`, from blocks on `device`; FileNotFoundError if one is missing."""
    found = {name: _halves_apart(name, x, sizes).to(dtype) for name, x in _tensors(folder, device)}
    return Llama(
        sizes,
        found["token_embd.weight"],
        [_layer(found, f"blk.{n}.") for n in range(sizes.layers)],
        found["output_norm.weight"],
    )


def tokens(folder: Path) -> Tensor:
    """The novels' tokens, one text behind the other: (N,) int64 on the CPU."""
    (path,) = folder.rglob(TEXT)
    return torch.from_numpy(np.load(path).astype(np.int64))


def _layer(found: dict[str, Tensor], prefix: str) -> Layer:
    def matrix(*names: str) -> Tensor:
        return torch.cat([found[f"{prefix}{name}.weight"] for name in names])

    return Layer(
        norm=matrix("attn_norm"),
        project=matrix("attn_q", "attn_k", "attn_v"),
        out=matrix("attn_output"),
        norm_inner=matrix("ffn_norm"),
        expand=matrix("ffn_gate", "ffn_up"),
        contract=matrix("ffn_down"),
    )


def _tensors(folder: Path, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Names as in the GGUF file, and values in fp32."""
    listed = sorted(folder.glob(f"part*/{LISTED}"))
    wanted = json.loads(listed[0].read_text())["parts"] if listed else "some"
    if len(listed) != wanted:
        raise FileNotFoundError(f"{folder} holds {len(listed)} parts; wanted {wanted}: see _smollm2_pack.py")
    for path in listed:
        blocks = torch.from_numpy(np.fromfile(path.with_name(BLOCKS), dtype=np.uint8)).to(device)
        for entry in json.loads(path.read_text())["tensors"]:
            raw = blocks[entry["offset"] : entry["offset"] + entry["bytes"]]
            yield entry["name"], FORMS[entry["type"]](raw).view(entry["shape"])


def _f32(raw: Tensor) -> Tensor:
    return raw.view(torch.float32)


def _q8_0(raw: Tensor) -> Tensor:
    """Blocks of 34 bytes: an fp16 step, 32 values in eight bits."""
    blocks = raw.view(-1, 34)
    return blocks[:, :2].clone().view(torch.float16).float() * blocks[:, 2:].clone().view(torch.int8).float()


def _q4_1(raw: Tensor) -> Tensor:
    """Blocks of 20 bytes: an fp16 step, an fp16 least value, 32 values in four bits: low ones first."""
    blocks = raw.view(-1, 20)
    step, least = blocks[:, :4].clone().view(torch.float16).float().split(1, dim=1)
    packed = blocks[:, 4:]
    return torch.cat([packed & 15, packed >> 4], dim=1).float() * step + least


FORMS: dict[str, Callable[[Tensor], Tensor]] = {"F32": _f32, "Q8_0": _q8_0, "Q4_1": _q4_1}


def _halves_apart(name: str, weight: Tensor, sizes: Sizes) -> Tensor:
    """Undoes GGUF's order of query and key rows: pairs that rotate together lie side by side there, D/2 apart here."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return weight
    return weight.unflatten(0, (-1, sizes.head // 2, 2)).transpose(1, 2).reshape_as(weight)
