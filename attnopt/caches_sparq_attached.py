"""The attention function that decodes with SparQ, and a model of transformers that uses it for a while."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from attnopt.caches_handed import Handle, Probe, check_model, new_tokens, switched
from attnopt.caches_sparq import TransformersSparqCache
from attnopt.caches_sparq_layer import NAME, REFUSAL, Choices, Made, Session
from attnopt.errors import Blame, UnsupportedError
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
    if isinstance(key, Handle):
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
    new = new_tokens(mask_function, sizes)
    return None if new == 1 else sdpa_mask(mask_function=mask_function, **sizes)


@contextmanager
def attached(
    model: nn.Module, capacity: int, keys: KeyLayouts, choices: Choices
) -> Iterator[TransformersSparqCache]:
    """See `attnopt.caches.sparq`."""
    model = check_model(model)
    if any(hasattr(module, SESSION) for module in model.modules()):
        raise UnsupportedError(
            "the model is attached already; wanted cache.fresh(), or to leave the other `with` first"
        )
    with switched(model, PROBE, _probed, mask_of_new_tokens):
        modules = _attending(model)
    session = Session()
    with ExitStack() as undo:
        undo.enter_context(switched(model, NAME, sparq_attention_forward, mask_of_new_tokens))
        undo.callback(setattr, session, "is_open", False)  # noqa: FBT003 - setattr takes its value so
        for module in modules:
            setattr(module, SESSION, session)
            undo.callback(delattr, module, SESSION)
        yield TransformersSparqCache(Made(capacity, keys, choices, len(modules), session))


class Noting(Probe):
    """A layer that notes in which order the model's modules attend."""

    def __init__(self, order: list[tuple["Noting", nn.Module]]) -> None:
        super().__init__()
        self.is_initialized, self.order, self.v = True, order, torch.empty(0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Handles that note the module."""
        del args, kwargs
        noting: Callable[..., Any] = self.note
        self.v = value_states
        return Handle.of(key_states, noting, REFUSAL), Handle.of(value_states, noting, REFUSAL)

    def note(self, q: Tensor, module: nn.Module) -> Tensor:
        """Zeros."""
        self.order.append((self, module))
        return self.v.new_zeros(q.shape[0], q.shape[2], q.shape[1], self.v.shape[3])


def _probed(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **others: Any) -> tuple[Tensor, None]:
    del args, others
    if not isinstance(key, Handle):
        raise UnsupportedError("attention to other keys than those of the cache")
    note: Any = key.attend
    return note(query, module), None


@torch.no_grad()
def _attending(model: PreTrainedModel) -> list[nn.Module]:
    """The attention module of each layer; every layer has to attend once, to what it has cached, in order."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    order: list[tuple[Noting, nn.Module]] = []
    cache = Cache(layers=[Noting(order) for _ in range(count)])
    ids = torch.arange(1, 1 + TOKENS, device=model.device)[None]
    with Blame("running the model on four tokens", "use SparqCache directly", UnsupportedError):
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    if [probe for probe, _ in order] != cache.layers:
        raise UnsupportedError(
            f"of {count} layers {len({probe for probe, _ in order})} attend through transformers' AttentionInterface "
            "and the cache; wanted each once, one after the other: use SparqCache directly"
        )
    return [module for _, module in order]
