"""One layer of SparQ's cache as transformers sees it: static buffers, exact for whoever reads its keys directly."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import CacheLayerMixin

from attnopt.caches_handed import Handle
from attnopt.errors import UnsupportedError
from attnopt.kernels.sparq.op_step import sparq_append, sparq_step
from attnopt.sparq_cache import KeyLayouts, Plan, SparqCache

NAME = "attnopt_sparq"

PADDED = (
    "the text is padded elsewhere than on the left of a prompt; wanted padding_side='left', and no gaps later"
)

#: What is said to whoever computes with the keys of an attached cache.
REFUSAL = (
    f'the model computes with the keys of the cache itself, instead of handing them to "{NAME}"; wanted '
    "attention through transformers' AttentionInterface, unchanged while attnopt.caches.sparq is open"
)


@dataclass(frozen=True, slots=True)
class Choices:
    """What a step reads: SparQ's r, k and l, and whether the mean value stands for the rest (None: if H = Hkv)."""

    rank: int = 32
    topk: int = 128
    local: int = 32
    mean_value: bool | None = None


@dataclass(slots=True, eq=False)
class Session:
    """What the model and its caches share while attached. waiting: the layer that has an update to attend to."""

    is_open: bool = True
    waiting: "SparqLayer | None" = None


@dataclass(slots=True, eq=False)
class Counts:
    """What all layers of a cache share; positions from starts to lengths - 1 count, both (B,) int32.

    is_fresh: nothing has been taken in since the last reset.
    """

    starts: Tensor | None = None
    lengths: Tensor | None = None
    is_fresh: bool = True

    def claim(self, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The two tensors, made at the first call."""
        if self.starts is None or self.lengths is None:
            self.starts, self.lengths = (
                torch.zeros(batch, dtype=torch.int32, device=device) for _ in range(2)
            )
            keep_in_place(self.starts, self.lengths)
        return self.starts, self.lengths


class SparqLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer: buffers of a SparqCache whose lengths belong to the whole cache; the last layer moves them on."""

    is_compileable = True
    is_sliding = False
    is_croppable = True

    def __init__(self, made: "Made", counts: Counts, place: int) -> None:
        super().__init__()
        self.made, self.counts = made, counts
        self.is_first, self.is_last = place == 0, place == made.layers - 1
        self.cache: SparqCache | None = None
        self.new: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        batch, kv_heads, _, d = key_states.shape
        plan = Plan(
            batch, kv_heads, self.made.capacity, d, value_states.shape[3], key_states.dtype, key_states.device,
            self.made.keys,
        )  # fmt: skip
        self.hold(SparqCache(plan))
        self.is_initialized = True

    def hold(self, cache: SparqCache) -> None:
        """Takes over the buffers of a cache, but for its lengths."""
        cache.starts, cache.lengths = self.counts.claim(cache.plan.batch, cache.k.device)
        self.cache, self.keys, self.values = cache, cache.k, cache.v
        self.batch_size = cache.plan.batch
        keep_in_place(*cache.stored())

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Attached: notes what is new, for `attend`. Otherwise takes it in and returns the whole buffers."""
        del args, kwargs
        if self.cache is None:
            self.lazy_initialization(key_states, value_states)
        session = self.made.session
        if not session.is_open:
            self._append(key_states, value_states)
            return self.keys, self.values
        if session.waiting is not None:
            raise UnsupportedError(
                "the cache got keys twice without attention in between (did the last call fail?); wanted "
                "cache.reset(), and one attention to each update"
            )
        session.waiting, self.new = self, (key_states, value_states)
        if torch.compiler.is_compiling():  # that each layer attends was seen when the model was attached
            return key_states, value_states
        return Handle.of(key_states, self.attend, REFUSAL), Handle.of(value_states, self.attend, REFUSAL)

    def attend(self, q: Tensor, scale: float, mask: Tensor | None) -> Tensor:
        """(B, H, N, Dv): takes in what `update` brought; one query by SparQ, several by exact attention."""
        self.made.session.waiting = None
        if self.cache is None or self.new is None:
            raise UnsupportedError("attention to a cache without an update before; wanted one each")
        (k, v), self.new = self.new, None
        if q.shape[2] == 1:
            return self._step(q, k, v, scale)
        is_fresh = self.counts.is_fresh
        if mask is not None and self.is_first:
            self._check_padding(mask)
        self._append(k, v)
        k, v = (k, v) if is_fresh else (self.cache.k, self.cache.v)
        if mask is None and not is_fresh:
            raise UnsupportedError(
                "several new tokens behind others, and no mask; wanted transformers' own mask"
            )
        return functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )

    def _step(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        held, chosen = self.held(), self.made.choices
        out = sparq_step(
            q, k, v, held.k, held.v,
            lengths=held.lengths, k_t=held.k_t, v_mean=held.v_mean, starts=held.starts, scale=scale,
            rank=chosen.rank, topk=chosen.topk, local=chosen.local, mean_value=chosen.mean_value,
        )  # fmt: skip
        self._advance(1)
        return out

    def _append(self, k: Tensor, v: Tensor) -> None:
        held = self.held()
        sparq_append(
            k, v, held.k, held.v,
            lengths=held.lengths, k_t=held.k_t, v_mean=held.v_mean, starts=held.starts,
        )  # fmt: skip
        self._advance(k.shape[2])

    def held(self) -> SparqCache:
        """The buffers."""
        if self.cache is None:
            raise UnsupportedError("the cache is empty; wanted a forward of the model first")
        return self.cache

    def _advance(self, tokens: int) -> None:
        if not self.is_last:
            return
        held = self.held()
        held.lengths.add_(tokens)
        self.counts.is_fresh = False
        if held.lengths.is_cuda:  # where the step cannot raise: on the CPU it does
            torch._assert_async((held.lengths <= held.capacity).all(), f"more than {held.capacity} positions")

    def _check_padding(self, mask: Tensor) -> None:
        """Takes in where the text of each row starts, from the mask (B, 1, N, N) of a prompt; later ones must agree.

        A step sees all positions from there on.
        """
        held, (new, keys) = self.held(), mask.shape[2:]
        seen, at = mask[:, 0, -1], torch.arange(keys, device=mask.device)
        if self.counts.is_fresh:
            held.starts.copy_((~seen).sum(-1))
        stop = keys if self.counts.is_fresh else held.lengths[:, None] + new
        is_whole = (seen == ((at >= held.starts[:, None]) & (at < stop))).all()
        if torch.compiler.is_compiling():
            torch._assert_async(is_whole, PADDED)
        elif not bool(is_whole):
            raise UnsupportedError(PADDED)

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """A prompt sees itself alone; whatever comes later sees the buffers."""
        if self.made.session.is_open and query_length != 1 and self.counts.is_fresh:
            return query_length, 0
        return self.get_max_length(), 0

    def get_seq_length(self) -> Any:
        """A tensor, as of transformers' static layers: the number of positions taken in, padding included."""
        return 0 if self.counts.lengths is None else self.counts.lengths[0]

    def get_max_length(self) -> int:
        return self.made.room

    def offload(self) -> None:
        raise UnsupportedError("a SparQ cache stays on its device; wanted offloading=False")


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """What a cache was made with."""

    capacity: int
    keys: KeyLayouts
    choices: Choices
    layers: int
    session: Session

    @property
    def room(self) -> int:
        """The capacity as SparqCache rounds it."""
        return SparqCache.rounded(self.capacity)


def keep_in_place(*buffers: Tensor) -> None:
    """Tells torch.compile that these never move, so that it need not copy them for a CUDA graph."""
    if not torch.compiler.is_compiling():
        for buffer in buffers:
            torch._dynamo.mark_static_address(buffer)
