"""The attention function that decodes with SparQ, and a model of transformers that uses it for a while."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask

from attnopt.caches_sparq import TransformersSparqCache
from attnopt.caches_sparq_layer import NAME, Choices, Keys, Made, Session
from attnopt.errors import Blame, OptionError, UnsupportedError
from attnopt.sparq_cache import KeyLayouts

PROBE = f"{NAME}_probe"
#: The attribute by which an attention module finds its session while it is attached.
SESSION = "attnopt_sparq_session"
#: Arguments of an attention function that would change what it computes unless they are None.
FOREIGN = ("sliding_window", "softcap", "s_aux", "position_bias")
#: How many tokens the probe runs.
TOKENS = 4


def sparq_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function "attnopt_sparq": (B, N, H, Dv), and no weights."""
    del value
    _check_plain(attention_mask, dropout, others)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(key, Keys):
        return key.attend(query, scale, attention_mask).transpose(1, 2).contiguous(), None
    layer = getattr(module, SESSION).waiting if torch.compiler.is_compiling() else None
    if layer is None:
        raise UnsupportedError(
            f'attn_implementation="{NAME}" and no SparQ cache; wanted past_key_values=cache with use_cache, or to '
            "leave `with attnopt.caches.sparq(model)` first"
        )
    return layer.attend(query, scale, attention_mask).transpose(1, 2).contiguous(), None


def _check_plain(mask: Tensor | None, dropout: float, others: dict[str, Any]) -> None:
    changed = [name for name in FOREIGN if others.get(name) is not None] + ["dropout"] * (dropout > 0)
    if mask is not None and mask.dtype != torch.bool:
        changed.append(f"a mask of {mask.dtype}")
    if changed:
        raise UnsupportedError(f"{', '.join(changed)}: not part of SparQ; wanted plain causal attention")


def mask_of_new_tokens(*, mask_function: Any = causal_mask_function, **sizes: Any) -> Tensor | None:
    """transformers' mask function "attnopt_sparq": as "sdpa" for several tokens; none for one, as the cache knows."""
    if mask_function is not causal_mask_function:
        raise UnsupportedError(
            "the model masks more than the future (its own sliding window, chunks or packing)"
        )
    new = sizes["q_length"] if "q_length" in sizes else sizes["cache_position"].shape[0]
    return None if new == 1 else sdpa_mask(mask_function=mask_function, **sizes)


@contextmanager
def attached(
    model: nn.Module, capacity: int, keys: KeyLayouts, choices: Choices
) -> Iterator[TransformersSparqCache]:
    """See `attnopt.caches.sparq`."""
    _check_model(model)
    assert isinstance(model, PreTrainedModel)  # noqa: S101 - for the type checker
    AttentionInterface.register(NAME, sparq_attention_forward)
    AttentionInterface.register(PROBE, _probed)
    AttentionMaskInterface.register(NAME, mask_of_new_tokens)
    session = Session()
    with ExitStack() as undo:
        before = model.config._attn_implementation
        with Blame(
            "switching the model's attention", "wanted a model with AttentionInterface", UnsupportedError
        ):
            undo.callback(model.set_attn_implementation, before)
            model.set_attn_implementation(PROBE)
        modules = _attending(model)
        model.set_attn_implementation(NAME)
        undo.callback(setattr, session, "is_open", False)  # noqa: FBT003 - setattr takes its value so
        for module in modules:
            setattr(module, SESSION, session)
            undo.callback(delattr, module, SESSION)
        yield TransformersSparqCache(Made(capacity, keys, choices, len(modules), session))


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise OptionError(f"the model is a {type(model).__name__}; wanted a PreTrainedModel of transformers")
    if model.training:
        raise UnsupportedError("the model is in training mode; wanted model.eval(): a cache is for decoding")
    if any(hasattr(module, SESSION) for module in model.modules()):
        raise UnsupportedError(
            "the model is attached already; wanted cache.fresh(), or to leave the other `with` first"
        )


class Probe(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """A layer that notes in which order the model's modules attend."""

    is_initialized = True

    def __init__(self, order: list[tuple["Probe", nn.Module]]) -> None:
        super().__init__()
        self.is_initialized, self.order, self.v = True, order, torch.empty(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        del key_states, value_states

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        del args, kwargs
        noting: Callable[..., Any] = self.note
        self.v = value_states
        return Keys.of(key_states, noting), Keys.of(value_states, noting)

    def note(self, q: Tensor, module: nn.Module) -> Tensor:
        """Zeros."""
        self.order.append((self, module))
        return self.v.new_zeros(q.shape[0], q.shape[2], q.shape[1], self.v.shape[3])

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return -1


def _probed(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **others: Any) -> tuple[Tensor, None]:
    del args, others
    if not isinstance(key, Keys):
        raise UnsupportedError("attention to other keys than those of the cache")
    note: Any = key.attend
    return note(query, module), None


@torch.no_grad()
def _attending(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer; every layer has to attend once, to what it has cached, in order."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    order: list[tuple[Probe, nn.Module]] = []
    cache = Cache(layers=[Probe(order) for _ in range(count)])
    ids = torch.arange(1, 1 + TOKENS, device=model.device)[None]
    with Blame("running the model on four tokens", "use SparqCache directly", UnsupportedError):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    if [probe for probe, _ in order] != cache.layers:
        raise UnsupportedError(
            f"of {count} layers {len({probe for probe, _ in order})} attend through transformers' AttentionInterface "
            "and the cache; wanted each once, one after the other: use SparqCache directly"
        )
    return [module for _, module in order]
