"""Key/value caches: of constant size for unlimited text (sinks and a rolling window), and for decoding with SparQ.

cache = StreamingCache(sinks=4, window=1020, rotary=Rotary.of(64, base=10_000.0))
for layer, (q, k, v) in ...:
    out = cache.attend(q, k, v, layer=layer)

with attnopt.caches.streaming(model, sinks=4, window=1020) as cache:  # a model of transformers
    model.generate(ids, past_key_values=cache)

with attnopt.caches.sparq(model, capacity=4096) as cache:
    model.generate(ids, past_key_values=cache)
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from attnopt.caches_ring import Arrival, Ring, refuse_gradients
from attnopt.caches_rotary import Rotary
from attnopt.errors import MissingError, OptionError, ShapeError
from attnopt.kernels.streaming.checks import check
from attnopt.kernels.streaming.ring import Span
from attnopt.sparq_cache import KeyLayouts, Memory, Plan, SparqCache, check_choices

__all__ = ["Memory", "Plan", "Rotary", "SparqCache", "StreamingCache", "sparq", "streaming"]

#: Whether `window` counts the query's own key (transformers' SinkCache), or stands beside it (the authors' script).
Counting = Literal["within", "beside"]


def span_of(sinks: int, window: int, counting: Counting, rollback: int) -> Span:
    """What the four numbers say; raises OptionError where they cannot be."""
    if counting not in {"within", "beside"}:
        raise OptionError(f"counting={counting!r}; wanted 'within' or 'beside'")
    own = 0 if counting == "within" else 1
    if sinks < 0 or window + own < 1 or window < 0 or rollback < 0:
        raise OptionError(
            f"sinks={sinks}, window={window}, counting={counting!r}, rollback={rollback}; wanted sinks >= 0, "
            "rollback >= 0, and a window in which a query sees itself"
        )
    return Span(sinks, window + own, rollback)


class StreamingCache:
    """StreamingLLM (Xiao et al., arXiv 2309.17453) for a decoding loop: cost and memory of a token are constant.

    Each query sees the first `sinks` keys and the last `window`, at the places which they have in that set: the
    window at its true distance, a sink as if the text between had never been. counting: "within", the window counts
    the query's own key; "beside", it comes on top of sinks + window, as in the authors' evaluation.
    rollback: how many newest tokens `crop` can surely take back, beside the last one; each costs one more slot.
    rotary: turns queries and keys, which come unturned; None for models without positions, or with ALiBi.
    slopes: float (H,), ALiBi's positive slopes (arXiv 2108.12409), the same in each layer.

    Keys are turned once, at their true position, and never again: sinks are scored with a second query, turned to
    its place among the keys that it sees. So nothing drifts, and any split of a text into calls gives the same.

    Raises OptionError where the numbers cannot be. Memory is claimed at a layer's first call, and then never grows.
    Forward only: nothing that is kept takes part in autograd.
    """

    def __init__(
        self,
        *,
        sinks: int = 4,
        window: int = 1020,
        counting: Counting = "within",
        rollback: int = 0,
        rotary: Rotary | None = None,
        slopes: Tensor | None = None,
    ) -> None:
        if rotary is not None and slopes is not None:
            raise OptionError("rotary and slopes; wanted one kind of positions, or none")
        self.span = span_of(sinks, window, counting, rollback)
        self.rotary, self.slopes = rotary, slopes
        self.layers: dict[int, Ring] = {}

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        layer: int = 0,
        scale: float | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Takes N new tokens of each sequence in, and returns what each attends to, (B, H, N, Dv) in q's dtype.

        q (B, H, N, D), k (B, Hkv, N, D), v (B, Hkv, N, Dv): before rotation; half, bfloat16, float or double; any
        strides; H a multiple of Hkv; D, Dv <= 256. N = 1 is a decoding step, which does not wait for the device and
        can be captured in a CUDA graph after the layer's first call; more is a prefill, in parallel, equal to N
        steps. scale: D ** -0.5 by default. keep: bool (B, N), False where there is no token: padding on either
        side, or a sequence that is finished; such rows return zeros and change nothing. All layers on one device.

        Raises ShapeError where tensors do not fit together or to what the cache holds, UnsupportedError as above.
        """
        _check(q, k, v, keep, self.slopes)
        ring = self.layers.get(layer)
        if ring is None:
            ring = self.layers[layer] = Ring(self.span, k, v)
            self._move(q.device)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return ring.attend(Arrival(q, k, v, keep, scale, self.slopes, self.rotary))

    def _move(self, device: torch.device) -> None:
        """Tables to where the layers are, once: a step that is captured must copy nothing from the host."""
        self.rotary = None if self.rotary is None else self.rotary.on(device)
        self.slopes = None if self.slopes is None else self.slopes.to(device)

    def lengths(self, layer: int = 0) -> Tensor:
        """(B,) int64 on the device: tokens taken in by each sequence, dropped ones included."""
        if layer not in self.layers:
            raise ShapeError(f"layer {layer} has taken in nothing; layers in use: {sorted(self.layers)}")
        return self.layers[layer].seen.clone()

    def crop(self, tokens: int) -> None:
        """Takes the last `tokens` of each sequence back, in all layers, or raises and changes nothing.

        UnsupportedError where the keys that the next query would see are gone: see `rollback`.
        """
        for ring in self.layers.values():
            ring.check_crop(tokens)
        for ring in self.layers.values():
            ring.crop(tokens)

    def reset(self) -> None:
        """Forgets every token; sizes and memory stay."""
        for ring in self.layers.values():
            ring.reset()

    def reorder(self, rows: Tensor) -> None:
        """Sequence n becomes what sequence rows[n] was, int64 (any number of rows): beams, or a part of a batch."""
        for ring in self.layers.values():
            ring.select(rows)

    def state_dict(self) -> dict[str, Any]:
        """Everything as copies: {"span": {...}, "layers": {layer: {"keys", "values", "seen", "top"}}}.

        Numbers and tensors only, so that `torch.load(..., weights_only=True)` reads it. Rotary and slopes belong to
        the model and are not part of it.
        """
        span = {"sinks": self.span.sinks, "window": self.span.window, "spare": self.span.spare}
        return {"span": span, "layers": {n: ring.state() for n, ring in self.layers.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Becomes what `state_dict` saved, on the device of the saved tensors; OptionError for other numbers."""
        if Span(**state["span"]) != self.span:
            raise OptionError(
                f"the saved cache has {Span(**state['span'])}, this one {self.span}; wanted the same"
            )
        self.layers = {int(n): Ring.of_state(self.span, saved) for n, saved in state["layers"].items()}
        for ring in self.layers.values():
            self._move(ring.seen.device)


@contextmanager
def streaming(
    model: torch.nn.Module,
    *,
    sinks: int = 4,
    window: int = 1020,
    counting: Counting = "within",
    rollback: int = 0,
) -> Iterator[Any]:
    """A cache for `model.generate(past_key_values=...)` of a transformers decoder; the model is as before afterwards.

    While the context is open the model's attention reads from the cache (attn_implementation "attnopt_streaming"),
    and its rotary module forms phases in fp64, so that positions beyond 2^24 stay apart. Everything is as in
    StreamingCache; several caches of one model: `cache.fresh()`.

    How positions enter is measured, not looked up: the model is run on a few tokens at several positions, with
    attention that returns nothing. Every layer's queries and keys have to turn exactly as its rotary table says, or
    not to depend on positions at all. UnsupportedError where they do otherwise (learned or added positions, a table
    that depends on the length as in dynamic NTK and LongRoPE, attention that does not go through transformers'
    AttentionInterface, sliding windows of the model's own, softcap, sink logits, custom 4-D masks).
    MissingError without transformers.
    """
    try:
        from attnopt.caches_attached import attached
    except ImportError as error:
        raise MissingError(
            f"transformers cannot be imported ({error}); install attnopt[hf], or use StreamingCache"
        ) from error
    with attached(model, span_of(sinks, window, counting, rollback)) as cache:
        yield cache


@contextmanager
def sparq(
    model: torch.nn.Module,
    *,
    capacity: int,
    rank: int = 32,
    topk: int = 128,
    local: int = 32,
    mean_value: bool | None = None,
    keys: KeyLayouts = "both",
) -> Iterator[Any]:
    """A cache for `model.generate(past_key_values=...)` of a transformers decoder; the model is as before afterwards.

    While the context is open a prompt is attended to exactly and each decoded token by SparQ (arXiv 2312.04985), an
    approximation, as `ops.sparq_step` says; `topk` >= the length is exact. Buffers for `capacity` positions are claimed
    at the first forward and never move, so a decoding step compiles once (fullgraph=True) and can be captured in a CUDA
    graph. Left padding of a prompt is read from its mask. keys: "both" layouts take half as much memory again as a
    plain cache; "one" takes no more, but then nearly all keys are read in each step: see `Plan`.
    `cache.memory()` says what was claimed; several caches of one model: `cache.fresh()`.

    After the context the cache still works, as a plain static cache with exact attention; torch.compile with
    backend="attnopt" and options={"softmax": "sparq"} then finds both key layouts in the graph.

    Raises OptionError for numbers that cannot be and for other models, UnsupportedError where attention does not go
    through transformers' AttentionInterface in each layer, once and in order, or is more than causal (sliding windows,
    softcap, sink logits), or a prompt is not padded on the left. MissingError without transformers.
    """
    check_choices(capacity, rank, topk, local, keys)
    try:
        from attnopt.caches_sparq_attached import attached
        from attnopt.caches_sparq_layer import Choices
    except ImportError as error:
        raise MissingError(
            f"transformers cannot be imported ({error}); install attnopt[hf], or use SparqCache"
        ) from error
    with attached(model, capacity, keys, Choices(rank, topk, local, mean_value)) as cache:
        yield cache


def _check(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, slopes: Tensor | None) -> None:
    check(q, k, v)
    if q.shape[2] != k.shape[2]:
        raise ShapeError(f"{q.shape[2]} queries and {k.shape[2]} keys; wanted one of each for a new token")
    if keep is not None and (keep.dtype != torch.bool or keep.shape != (q.shape[0], q.shape[2])):
        wanted = f"bool {(q.shape[0], q.shape[2])}, True where there is a token"
        raise ShapeError(f"keep is {keep.dtype} {tuple(keep.shape)}; wanted {wanted}")
    if slopes is not None and slopes.shape != (q.shape[1],):
        raise ShapeError(f"slopes is {tuple(slopes.shape)}; wanted ({q.shape[1]},), one for each query head")
    refuse_gradients(q, k, v)
