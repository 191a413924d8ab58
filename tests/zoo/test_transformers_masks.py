"""The masks that Hugging Face models make, as torch.compile sees them: proven, and true to what they compute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from mask_trace import dense, roles_of, run
from torch import Tensor, nn
from transformers import masking_utils

from attnopt.passes.masks import AdditiveReading, MaskReading, read_additive, read_visible
from attnopt.passes.sizes import shape_of
from attnopt.shadow import Shadow, trace

EMBEDDED = torch.randn(2, 10, 32)
PADDED = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 10])
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5, 6, 7]])
IMAGES = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, 1, -1], [0, 0, 0, -1, -1, -1, -1, 1, 1, 1]])
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}


def config(attention: str) -> Any:
    held = transformers.MistralConfig(**SIZES, sliding_window=4)
    held._attn_implementation = attention
    held.attention_chunk_size = 4
    return held


def made(name: str, held: Any, kind: str, x: Tensor, given: Tensor) -> Tensor:
    """One of the library's functions on padding, positions, image blocks, or none of these."""
    make = getattr(masking_utils, name)
    padding = given if kind == "padded" else None
    more = {"packed": {"position_ids": given}, "images": {"block_sequence_ids": given}}.get(kind, {})
    return make(held, x, padding, past_key_values=None, **more)


class Masked(nn.Module):
    """Makes the mask as models do: from a configuration that a module holds."""

    def __init__(self, name: str, kind: str, held: Any) -> None:
        super().__init__()
        self.name, self.kind, self.config = name, kind, held

    def forward(self, x: Tensor, given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return made(self.name, self.config, self.kind, x, given), x + 0, given + 0


def shadow_of_mask(function: Callable[..., Any], *inputs: Tensor, dynamic: bool) -> tuple[Shadow, Any]:
    """The shadow of what Dynamo captures, and the node of its first result."""
    found: list[tuple[Shadow, Any]] = []

    def keep(module: Any, _: Any) -> Callable[..., Any]:
        shadow = trace(module)
        found.append((shadow, shadow.outputs[module.graph.output_node().args[0][0]]))
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, dynamic=dynamic)(*inputs)
    return found[0]


def tensors_of(shadow: Shadow) -> list[Any]:
    """The inputs that are tensors."""
    return [n for n in shadow.nodes if n.op == "placeholder" and isinstance(n.meta["val"], Tensor)]


def read(node: Any, x: Any) -> MaskReading | AdditiveReading | None:
    batch, queries, _ = shape_of(x)
    sizes = {"b": batch, "h": 4, "i": queries, "j": shape_of(node)[-1]}
    value = node.meta["val"]
    reader = read_visible if value.dtype == torch.bool else read_additive
    return reader(node, roles_of(value), sizes)


CASES = {
    ("create_causal_mask", "plain"): "causal",
    ("create_causal_mask", "padded"): "causal & padding",
    ("create_causal_mask", "packed"): "causal & segments",
    ("create_causal_mask", "images"): "causal | (opaque & segments)",
    ("create_sliding_window_causal_mask", "plain"): "causal & window(4)",
    ("create_sliding_window_causal_mask", "padded"): "causal & padding & window(4)",
    ("create_sliding_window_causal_mask", "packed"): "causal & segments & window(4)",
    ("create_sliding_window_causal_mask", "images"): "(causal & window(4)) | (opaque & segments)",
    ("create_chunked_causal_mask", "plain"): "causal & chunk(4)",
    ("create_chunked_causal_mask", "padded"): "causal & padding & segments",
    ("create_chunked_causal_mask", "packed"): "causal & segments & segments",
    ("create_bidirectional_mask", "padded"): "padding",
    ("create_bidirectional_sliding_window_mask", "plain"): "causal(4) & window(9, 4)",
    ("create_bidirectional_sliding_window_mask", "padded"): "causal(4) & padding & window(9, 4)",
}
GIVEN = {"padded": PADDED, "packed": PACKED, "images": IMAGES}
IS_CAUSAL = ("create_causal_mask", "plain")  # the library makes no mask for its sdpa attention


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_mask_of_the_library_is_proven(name: str, kind: str, attention: str, dynamic: bool) -> None:
    if (name, kind) == IS_CAUSAL and attention == "sdpa":
        assert made(name, config(attention), kind, EMBEDDED, PADDED) is None
        return
    held, inputs = config(attention), (EMBEDDED, GIVEN.get(kind, PADDED))
    shadow, node = shadow_of_mask(Masked(name, kind, held), *inputs, dynamic=dynamic)
    tensors = tensors_of(shadow)
    (embedded,) = [n for n in tensors if n.meta["val"].dim() == 3]
    reading = read(node, embedded)
    visible = reading.visible if isinstance(reading, AdditiveReading) else reading
    assert visible is not None
    assert str(visible.mask) == CASES[name, kind]
    if not dynamic:
        assert_true(shadow, node, visible, [EMBEDDED if n is embedded else inputs[1] for n in tensors])


def assert_true(shadow: Shadow, node: Any, visible: MaskReading, inputs: list[Tensor]) -> None:
    """The reading, in all its words, is the mask that the graph computes."""
    values = run(shadow.module, *inputs)
    computed = values[node]
    where = computed if computed.dtype == torch.bool else computed == 0
    for words in (visible.mask, *visible.otherwise):
        claimed, actual = torch.broadcast_tensors(dense(visible, values, 10, 10, words), where)
        assert torch.equal(claimed, actual), words


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_new_queries_see_what_a_growing_cache_holds(dynamic: bool, padded: bool) -> None:
    held = transformers.LlamaConfig(**SIZES)
    held._attn_implementation = "eager"
    cache = transformers.DynamicCache(config=held)
    for layer in range(2):
        cache.update(torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8), layer)
    padding = torch.ones(2, 9, dtype=torch.long) if padded else None
    shadow, node = shadow_of_mask(
        lambda x: (masking_utils.create_causal_mask(held, x, padding, cache), x + 0),
        EMBEDDED[:, :3],
        dynamic=dynamic,
    )
    (embedded,) = [n for n in tensors_of(shadow) if n.meta["val"].dim() == 3]
    reading = read(node, embedded)
    assert isinstance(reading, AdditiveReading)
    assert str(reading.visible.mask) == ("causal(Sk-Sq) & padding" if padded else "causal(Sk-Sq)")
