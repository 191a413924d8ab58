"""The attention function that reads a streaming cache, and a model of transformers that uses it for a while."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from attnopt.caches_handed import Handle, Probe, check_model, new_tokens, switched
from attnopt.caches_measured import FAR, NEAR, Seen, Table, far_positions, tables_of, turns
from attnopt.caches_rotary import Rotary
from attnopt.caches_transformers import NAME, REFUSAL, Session, TransformersCache
from attnopt.errors import Blame, UnsupportedError
from attnopt.kernels.streaming.ring import Span

#: Arguments of an attention function that would change what it computes, with the values that change nothing.
PLAIN = {"sliding_window": (None,), "softcap": (None,), "s_aux": (None,), "position_bias": (None,)}


def streaming_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function "attnopt_streaming": (B, N, H, Dv), and no weights."""
    del module, value
    if not isinstance(key, Handle):
        raise UnsupportedError(
            f'attn_implementation="{NAME}" and no streaming cache; wanted past_key_values=cache with use_cache, or '
            "to leave `with attnopt.caches.streaming(model)` first"
        )
    changed = [name for name, plain in PLAIN.items() if others.get(name) not in plain] + ["dropout"] * (
        dropout > 0
    )
    if changed or (attention_mask is not None and attention_mask.dim() != 2):
        what = (
            ", ".join(changed)
            or f"a mask of {attention_mask.dim() if attention_mask is not None else 0} dimensions"
        )
        raise UnsupportedError(
            f"{what}: not part of sinks and window; wanted plain attention and a 2-D padding mask"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return key.attend(query, scale, attention_mask).transpose(1, 2).contiguous(), None


def padding_of_new_tokens(
    *, attention_mask: Tensor | None = None, mask_function: Any = causal_mask_function, **sizes: Any
) -> Tensor | None:
    """transformers' mask function "attnopt_streaming": bool (B, N), the padding of the new tokens, or None."""
    new = new_tokens(mask_function, sizes)
    if attention_mask is None:
        return None
    return attention_mask[:, attention_mask.shape[1] - new :].to(torch.bool)


@contextmanager
def attached(model: nn.Module, span: Span) -> Iterator[TransformersCache]:
    """See `attnopt.caches.streaming`."""
    model = check_model(model)
    session = Session()
    with ExitStack() as undo:
        undo.enter_context(switched(model, NAME, streaming_attention_forward, padding_of_new_tokens))
        tables = tables_of(model)
        rotaries = _rotaries(model, tables)
        for table in tables:
            undo.callback(
                table.module.register_forward_hook(_exactly(table, session), with_kwargs=True).remove
            )
        yield TransformersCache(span, rotaries, session)


def _rotaries(model: PreTrainedModel, tables: list[Table]) -> list[Rotary | None]:
    """How each layer turns queries and keys, from two runs of four tokens each."""
    config = model.config.get_text_config(decoder=True)
    far = far_positions(getattr(config, "max_position_embeddings", None) or FAR[1])
    by = torch.tensor([[b - a for a, b in zip(NEAR, far, strict=True)]], device=model.device)
    return turns(_seen_at(model, NEAR), _seen_at(model, far), by, tables)


def _exactly(table: Table, session: Session) -> Callable[..., tuple[Tensor, Tensor]]:
    """A forward hook that gives cos and sin from phases in fp64, and notes the positions."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> tuple[Tensor, Tensor]:
        del module
        x = args[0] if args else kwargs["x"]
        positions = args[1] if len(args) > 1 else kwargs["position_ids"]
        session.positions = positions
        cos, sin = table.waves(x, positions)
        return cos.to(output[0].dtype), sin.to(output[1].dtype)

    return hook


class Noting(Probe):
    """A layer that notes what attention is given, and answers zeros: no layer hears of another's positions."""

    def __init__(self) -> None:
        super().__init__()
        self.is_initialized = True
        self.seen: list[Seen] = []
        self.new: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Handles that note the query."""
        del args, kwargs
        self.new = key_states, value_states
        return Handle.of(key_states, self.attend, REFUSAL), Handle.of(value_states, self.attend, REFUSAL)

    def attend(self, q: Tensor, scale: float, keep: Tensor | None) -> Tensor:
        """Zeros."""
        del scale, keep
        if self.new is not None:
            self.seen.append(Seen(q, *self.new))
        v = self.seen[-1].v
        return v.new_zeros(*q.shape[:3], v.shape[3])


@torch.no_grad()
def _seen_at(model: PreTrainedModel, positions: tuple[int, ...]) -> list[Seen]:
    """What each layer's attention is given for four tokens at these positions; every layer has to ask once."""
    cache = Cache(layer_class_to_replicate=Noting)
    ids = torch.arange(1, 1 + len(positions), device=model.device)[None]
    at = torch.tensor([positions], device=model.device)
    with Blame("running the model on four tokens", "use StreamingCache directly", UnsupportedError):
        model(input_ids=ids, position_ids=at, past_key_values=cache, use_cache=True)
    asked = [len(layer.seen) for layer in cache.layers]
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    if asked != [1] * layers:
        raise UnsupportedError(
            f"of {layers} layers {sum(n == 1 for n in asked)} attend once through transformers' AttentionInterface "
            "and the cache; wanted all of them: use StreamingCache directly"
        )
    return [layer.seen[0] for layer in cache.layers]
