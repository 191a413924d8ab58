"""What sparq_model_gpu.py runs: a Llama that decodes one token over full caches, densely or with SparQ.

Every cache holds random keys and values at all positions but the last, which the token takes: each step is the same,
and dense attention needs no mask. Sizes are counted in bytes before anything is claimed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from _smollm2_gpu import Attention, Llama, Sizes, random_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from attnopt.caches import Plan, SparqCache
from attnopt.ops import sparq_step

#: q (B, H, 1, D), keys and values (B, Hkv, S, D), to (B, H, 1, D).
Way = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Rows and a matrix, to their product with its transpose.
Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Choices:
    """Of SparQ."""

    rank: int = 32
    topk: int = 128
    local: int = 32


@dataclass(frozen=True)
class Setting:
    """A model and what it decodes over; `context` counts the token itself."""

    name: str
    sizes: Sizes
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.name} B{self.batch} S{self.context}"

    @property
    def weights(self) -> int:
        """Elements."""
        s = self.sizes
        return s.layers * s.width * (sum(s.projected) + s.width + 3 * s.inner) + s.vocabulary * s.width

    @property
    def cached(self) -> int:
        """Elements of the keys and values."""
        s = self.sizes
        return 2 * s.layers * self.batch * s.kv_heads * s.head * self.context


@dataclass(frozen=True)
class Place:
    """Where tensors are made, and in what dtype; fused: Inductor joins what lies between matrix products."""

    device: torch.device
    dtype: torch.dtype
    fused: bool = False


# The model.


@dataclass(frozen=True, eq=False)
class Decoder:
    """A model whose queries and keys come to the attention function turned, as of a token at one position.

    cos, sin (D / 2,), fp32: of that position. sides: what its layers do before and after attention, by what multiplies.
    """

    model: Llama
    cos: Tensor
    sin: Tensor
    sides: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]]

    def move(self, position: int) -> None:
        """Another position."""
        one = torch.tensor([[position]], device=self.cos.device)
        cos, sin = self.model.rotary.waves(self.cos, one, 1.0)
        self.cos.copy_(cos[0, 0])
        self.sin.copy_(sin[0, 0])

    def multiply_by(self, name: str) -> None:
        """One of `products` from now on."""
        before, after = self.sides[name]
        turning = sum(self.model.sizes.projected[:2])
        self.model.before = lambda x, *weights: before(x, *weights, self.cos, self.sin, turning)
        # Each way to attend has strides of its own where a size is 1; for each of them it would be compiled anew.
        self.model.after = lambda x, mixed, *rest: after(x, mixed.reshape(x.shape[0], -1)[:, None], *rest)


def decoder(sizes: Sizes, place: Place, position: int = 0) -> Decoder:
    """Random weights."""
    model = random_model(sizes, place.device, place.dtype)
    cos, sin = torch.empty(2, sizes.head // 2, device=place.device).unbind()
    sides = {
        name: tuple(torch.compile(f) if place.fused else f for f in sides_of(times))
        for name, times in products(place).items()
    }
    found = Decoder(model, cos, sin, sides)
    found.move(position)
    found.multiply_by("cublas")
    return found


def products(place: Place) -> dict[str, Product]:
    """x (B, 1, K), weight (N, K) -> (B, 1, N): what a layer may multiply by."""
    found: dict[str, Product] = {"cublas": lambda x, weight: x @ weight.mT}
    if place.fused:
        from _sparq_model_product import product

        found["triton"] = product
    return found


def sides_of(times: Product) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """What a layer does before attention, turning included, and after it."""

    def before(
        x: Tensor, norm: Tensor, project: Tensor, epsilon: float, cos: Tensor, sin: Tensor, turning: int
    ) -> Tensor:
        """x (B, 1, W) to q, k and v side by side; of them the first `turning` features turn, by cos, sin (D / 2,)."""
        projected = times(rms_norm(x, x.shape[-1:], norm, epsilon), project)
        a, b = projected[..., :turning].unflatten(-1, (-1, 2 * cos.shape[0])).chunk(2, dim=-1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return torch.cat([turned.flatten(-2).to(x.dtype), projected[..., turning:]], dim=-1)

    def after(
        x: Tensor, mixed: Tensor, out: Tensor, norm: Tensor, expand: Tensor, contract: Tensor, epsilon: float
    ) -> Tensor:
        """x (B, 1, W) and what attention made of it, to the next layer's x."""
        x = x + times(mixed, out)
        gate, up = times(rms_norm(x, x.shape[-1:], norm, epsilon), expand).chunk(2, dim=-1)
        return x + times(silu(gate) * up, contract)

    return before, after


# Its caches.


def filled(setting: Setting, place: Place, keys: str, seed: int = 0) -> list[SparqCache]:
    """One for each layer, full but for one place; the same keys and values for the same seed.

    keys: "one" layout is a plain static cache, of which dense attention reads k and v; "both" is SparQ's.
    """
    s = setting.sizes
    sizes = (setting.batch, s.kv_heads, setting.context, s.head, s.head)
    plan = Plan(*sizes, place.dtype, place.device, "one" if keys == "one" else "both")
    if SparqCache.rounded(setting.context) != setting.context:
        raise ValueError(f"a context of {setting.context}; wanted one that a cache takes as it is")
    torch.manual_seed(seed)
    return [random_cache(plan) for _ in range(s.layers)]


def random_cache(plan: Plan) -> SparqCache:
    """Holds all positions but the last."""
    cache, held = SparqCache(plan), plan.capacity - 1
    cache.k.normal_()
    cache.v.normal_()
    if cache.k_t is not None:
        cache.k_t.copy_(cache.k.mT)
    cache.v_mean.copy_(cache.v[:, :, :held].mean(2, dtype=cache.v_mean.dtype))
    cache.lengths.fill_(held)
    return cache


# Its attention.


def by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As torch offers it."""
    return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] > k.shape[1])


def by_group(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads that share keys as so many queries: no key is read twice, and nothing is masked that could tell."""
    packed = q.reshape(*k.shape[:2], -1, q.shape[3])
    return scaled_dot_product_attention(packed, k, v).reshape(q.shape)


def under(backend: SDPBackend, run: Way) -> Way:
    """The same by one backend."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return run(q, k, v)

    return attend


def ways(setting: Setting, device: torch.device) -> dict[str, Way]:
    """All that dense attention is tried by."""
    if device.type != "cuda":
        return {"torch": by_head}
    shared = {"packed ": by_group} if setting.sizes.heads > setting.sizes.kv_heads else {}
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    return {
        f"{how}{name}": under(backend, run)
        for how, run in {"": by_head, **shared}.items()
        for name, backend in backends.items()
    }


def dense(caches: list[SparqCache], way: Way) -> Attention:
    """Appends, then reads everything."""
    where = caches[0].lengths[:1].long()

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        cache = caches[layer]
        cache.k.index_copy_(2, where, k)
        cache.v.index_copy_(2, where, v)
        return way(q, cache.k, cache.v)

    return attend


def sparq(caches: list[SparqCache], choices: Choices) -> Attention:
    """SparQ's whole step; all layers share the lengths, which stay."""
    lengths, (rank, topk, local) = caches[0].lengths, (choices.rank, choices.topk, choices.local)

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        c = caches[layer]
        return sparq_step(
            q, k, v, c.k, c.v, k_t=c.k_t, v_mean=c.v_mean, starts=c.starts, lengths=lengths,
            rank=rank, topk=topk, local=local,
        )  # fmt: skip

    return attend


def warm(setting: Setting, place: Place, choices: Choices) -> None:
    """Compiles SparQ's kernels for a setting into Triton's cache on disk, for the process that times them."""
    sizes = replace(setting.sizes, layers=1)
    q, k, v = (
        torch.randn(setting.batch, heads, 1, sizes.head, device=place.device, dtype=place.dtype)
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    )
    sparq(filled(replace(setting, sizes=sizes), place, "both"), choices)(q, k, v, 0)


def none(setting: Setting, place: Place) -> Attention:
    """No attention at all: what the rest of the model takes."""
    sizes = setting.sizes
    zeros = torch.zeros(setting.batch, sizes.heads, 1, sizes.head, device=place.device, dtype=place.dtype)
    return lambda q, k, v, layer: zeros  # noqa: ARG005  (what any attention function takes)


# Around it.


def apart(mine: Tensor, theirs: Tensor) -> Tensor:
    """||mine - theirs|| / ||theirs|| by row."""
    return (mine.double() - theirs.double()).norm(dim=-1) / theirs.double().norm(dim=-1)


def tokens(setting: Setting, place: Place) -> Tensor:
    """(B, 1): one to each sequence."""
    torch.manual_seed(1)
    return torch.randint(setting.sizes.vocabulary, (setting.batch, 1), device=place.device)
