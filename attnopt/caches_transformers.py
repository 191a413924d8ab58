"""The streaming cache as transformers sees it: a Cache of layers whose keys only one attention function can read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from attnopt.caches_handed import Handle
from attnopt.caches_ring import Arrival, Ring, refuse_gradients
from attnopt.caches_rotary import Rotary
from attnopt.errors import OptionError, ShapeError, UnsupportedError
from attnopt.kernels.streaming.ring import Span

NAME = "attnopt_streaming"

#: What is said to whoever computes with the keys of a streaming cache.
REFUSAL = (
    f'the model computes with the keys of the streaming cache itself, instead of handing them to "{NAME}": '
    "either its attention does not go through transformers' AttentionInterface (then use StreamingCache "
    "directly), or it is called outside of `with attnopt.caches.streaming(model) as cache:`"
)


@dataclass
class Session:
    """What the rotary hook saw last, for the first layer to compare its positions with."""

    positions: Tensor | None = None


class StreamingLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """One layer of a stream. Keys come turned at their position already; `rotary` turns the query to the sinks."""

    is_compileable = False
    is_sliding = False

    def __init__(self, span: Span, rotary: Rotary | None, session: Session | None) -> None:
        super().__init__()
        self.span, self.rotary, self.session = span, rotary, session
        self.is_croppable = span.spare > 0
        self.ring: Ring | None = None
        self.columns = 0
        self.waiting: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.ring = Ring(self.span, key_states, value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        del args, kwargs
        if self.waiting is not None:
            raise UnsupportedError(
                "the streaming cache got keys twice without attention in between (did the last call fail?); "
                "wanted cache.reset(), and one attention to each update"
            )
        if self.ring is None:
            self.lazy_initialization(key_states, value_states)
        self.waiting = key_states, value_states
        self.columns += key_states.shape[2]
        return Handle.of(key_states, self.attend, REFUSAL), Handle.of(value_states, self.attend, REFUSAL)

    def attend(self, q: Tensor, scale: float, keep: Tensor | None) -> Tensor:
        """(B, H, N, Dv): takes in what `update` brought."""
        if self.ring is None or self.waiting is None:
            raise UnsupportedError("attention to a streaming cache without an update before; wanted one each")
        (k, v), self.waiting = self.waiting, None
        refuse_gradients(q, k, v)
        if keep is not None and keep.shape != (q.shape[0], q.shape[2]):
            wanted = (q.shape[0], q.shape[2])
            raise ShapeError(f"the padding mask of the new tokens is {tuple(keep.shape)}; wanted {wanted}")
        if self.session is not None and self.session.positions is not None:
            self._check_positions(self.session.positions, self.ring.positions(q.shape[2], keep), keep)
        return self.ring.attend(Arrival(q, k, v, keep, scale, None, self.rotary, turned=True))

    @staticmethod
    def _check_positions(given: Tensor, t: Tensor, keep: Tensor | None) -> None:
        """The model has to have turned its keys at the positions that the cache counts."""
        differ = given != t if given.shape[-1] == t.shape[-1] else torch.ones_like(t, dtype=torch.bool)
        if bool((differ if keep is None else differ & keep).any()):
            raise UnsupportedError(
                f"position_ids {given.tolist()} where the cache counts {t.tolist()}; wanted the "
                "number of tokens before, padding left out: attention_mask.cumsum(-1) - 1, as `generate` does"
            )

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else query_length.shape[0]
        return self.columns + new, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.columns, self.waiting = 0, None
        if self.ring is not None:
            self.ring.reset()

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise OptionError(f"crop({tokens_to_remove}); wanted minus the number of tokens to take back")
        if self.ring is not None:
            self.ring.crop(-tokens_to_remove)
            self.columns += tokens_to_remove

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.ring is not None:
            self.ring.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.ring is not None:
            rows = torch.arange(self.ring.seen.shape[0], device=self.ring.seen.device)
            self.ring.select(rows.repeat_interleave(repeats))

    def offload(self) -> None:
        raise UnsupportedError("a streaming cache is small and stays on its device; wanted offloading=False")


class TransformersCache(Cache):  # type: ignore[misc]  # transformers has no types
    """A transformers Cache whose layers are StreamingLayers: made by `attnopt.caches.streaming`."""

    def __init__(self, span: Span, rotaries: list[Rotary | None], session: Session) -> None:
        self.made_of = span, rotaries, session
        layers = [StreamingLayer(span, r, None if n else session) for n, r in enumerate(rotaries)]
        super().__init__(layers=layers)

    def fresh(self) -> "TransformersCache":
        """Another, empty cache for the same model and the same `with`."""
        return TransformersCache(*self.made_of)

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back -`tokens_to_remove` tokens in all layers, or raises UnsupportedError and changes nothing."""
        for layer in self.layers:
            if layer.ring is not None and tokens_to_remove < 0:
                layer.ring.check_crop(-tokens_to_remove)
        super().crop(tokens_to_remove)

    def state_dict(self) -> dict[str, Any]:
        """Everything as copies, numbers and tensors only."""
        layers = [{"columns": x.columns, "ring": x.ring and x.ring.state()} for x in self.layers]
        return {"slots": self.made_of[0].slots, "sinks": self.made_of[0].sinks, "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Becomes what `state_dict` saved; raises OptionError if that was a cache of other sizes."""
        span = self.made_of[0]
        found, wanted = (state["slots"], state["sinks"]), (span.slots, span.sinks)
        if found != wanted or len(state["layers"]) != len(self.layers):
            raise OptionError(
                f"the saved cache has slots, sinks = {found}; wanted {wanted} and the same layers"
            )
        for layer, saved in zip(self.layers, state["layers"], strict=True):
            layer.columns, layer.waiting = saved["columns"], None
            layer.ring = None if saved["ring"] is None else Ring.of_state(span, saved["ring"])
            layer.is_initialized = layer.ring is not None
