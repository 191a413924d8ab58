"""What every cache of transformers here hands out, and how a model is switched to the attention that reads it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from attnopt.errors import Blame, OptionError, UnsupportedError

Attended = Callable[[Tensor, float, Tensor | None], Tensor]

#: Torch functions that only ask for a property: shape, dtype, device and the like.
ASKING = frozenset({"__get__", "size", "dim", "stride", "__repr__"})


class Handle(torch.Tensor):
    """What `update` returns instead of all keys: one attention function can attend to it, everything else raises."""

    attend: Attended
    refusal: str

    @staticmethod
    def of(x: Tensor, attend: Attended, refusal: str) -> "Handle":
        """A handle in the form of the new keys or values. refusal: what is said to whoever computes with it."""
        handle: Handle = torch.Tensor._make_subclass(Handle, x)
        handle.attend, handle.refusal = attend, refusal
        return handle

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            asks = getattr(func, "__name__", "") in ASKING
            answer = func(*args, **(kwargs or {})) if asks else NotImplemented
        if answer is NotImplemented or isinstance(answer, Tensor):
            raise UnsupportedError(_refusal_in((*args, *(kwargs or {}).values())))
        return answer


def _refusal_in(given: Any) -> str:
    """The text of the first handle among the arguments of a torch function, which may be in lists."""
    for x in given:
        if isinstance(x, Handle):
            return x.refusal
        if isinstance(x, (list, tuple)):
            return _refusal_in(x)
    return "the model computes with the keys of the cache itself"


class Probe(CacheLayerMixin):  # type: ignore[misc]  # transformers has no types
    """A layer that holds nothing, for running a model to see what its attention is given."""

    is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to make."""
        del key_states, value_states

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """As many keys as queries."""
        return (query_length if isinstance(query_length, int) else query_length.shape[0]), 0

    def get_seq_length(self) -> int:
        """None was there before."""
        return 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def check_model(model: nn.Module) -> PreTrainedModel:
    """The model, or an error where it is none of transformers or is in training mode."""
    if not isinstance(model, PreTrainedModel):
        raise OptionError(f"the model is a {type(model).__name__}; wanted a PreTrainedModel of transformers")
    if model.training:
        raise UnsupportedError("the model is in training mode; wanted model.eval(): a cache is for decoding")
    return model


@contextmanager
def switched(model: PreTrainedModel, name: str, forward: Any, mask: Any) -> Iterator[None]:
    """The model with transformers' attention function `forward` and mask function `mask`, registered as `name`."""
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, mask)
    before = model.config._attn_implementation
    try:
        with Blame(
            "switching the model's attention", "wanted a model with AttentionInterface", UnsupportedError
        ):
            model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)


def new_tokens(mask_function: Any, sizes: Mapping[str, Any]) -> Any:
    """How many tokens a mask function is asked about; an error where the model masks more than the future."""
    if mask_function is not causal_mask_function:
        raise UnsupportedError(
            "the model masks more than the future (its own sliding window, chunks or packing)"
        )
    return sizes["q_length"] if "q_length" in sizes else sizes["cache_position"].shape[0]
