"""Tensors that a module holds (buffers, plain attributes): inputs of the graph whose values are known while compiling.

torch.compile passes them to the graph like any other input, and nobody promises that they stay as they are. What is
proven from their values therefore holds only as long as a run-time check says so (attnopt.guards).

A mask that one compiled graph hands to another, because Dynamo broke the function in between, is an input like these:
the graph that made it has noted on it what it proved of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

#: Key in the metadata of a graph input that a module holds.
BUFFER = "attnopt_buffer"
#: Attribute of a tensor that one compiled graph hands to another.
NOTE = "_attnopt_note"
#: Key in the metadata of an input of an exported program that is a parameter, a buffer or a constant.
HELD = "attnopt_held"
#: A tensor with more elements is no mask: it would have to be looked at as a whole.
LARGEST = 1 << 24


@dataclass(slots=True)
class Buffer:
    """value: as it is while compiling. place: of the graph's inputs. read: whether something was proven from it.

    handed: what the compiled graph that made it has proven of it; None for what a module holds.
    """

    value: Tensor
    place: int
    read: bool = False
    handed: object = None


def offer(module: GraphModule, inputs: Sequence[Any]) -> bool:
    """Notes the values of inputs that modules hold; whether there are any. inputs: those of the graph, in order."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(inputs):
        return False
    for place, (node, value) in enumerate(zip(placeholders, inputs, strict=True)):
        if _is_held(node.meta) and _is_plain(value):
            node.meta[BUFFER] = Buffer(value, place)
    return any(BUFFER in node.meta for node in placeholders)


def offer_noted(module: GraphModule, inputs: Sequence[Any]) -> None:
    """Notes the inputs of which another compiled graph has proven something."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for place, (node, value) in enumerate(zip(placeholders, inputs, strict=False)):
        proven = note_on(value)
        if proven is not None:
            node.meta[BUFFER] = Buffer(value, place, handed=proven)


def buffers_read(module: GraphModule) -> Iterator[Buffer]:
    """The buffers from which something was proven."""
    for node in module.graph.nodes:
        buffer = node.meta.get(BUFFER)
        if node.op == "placeholder" and buffer is not None and buffer.read:
            yield buffer


def write_note(value: Any, proven: object) -> None:
    """Notes on a tensor what is proven of its elements as they are now."""
    if type(value) is Tensor and not value.is_inference():
        setattr(value, NOTE, (value._version, proven))


def note_on(value: Any) -> object:
    """What is noted on a tensor; None if nothing is, or it was written to since."""
    if type(value) is not Tensor or value.is_inference():
        return None
    version, proven = getattr(value, NOTE, (None, None))
    return proven if version == value._version else None


def is_held(meta: Mapping[str, Any]) -> bool:
    """Whether a graph input is a parameter or a buffer; HELD is set for exported programs."""
    return HELD in meta or _is_held(meta)


def _is_held(meta: Mapping[str, Any]) -> bool:
    """Dynamo marks what belongs to a module: its address is the same at each call."""
    return "_dynamo_static_input_type" in (meta.get("tensor_dict") or {})


def _is_plain(value: Any) -> bool:
    """A tensor that has numbers, counts its versions and is not trained: positions, a table over pairs, decays.

    Single numbers are left out: counters are kept like that, and change at each call.
    """
    return (
        type(value) is Tensor
        and not (value.is_inference() or value.is_meta or value.is_quantized)
        and not value.requires_grad
        and value.layout == torch.strided
        and value.numel() <= LARGEST
        and (_long(value) in (1, 2) or (_long(value) == 3 and value.is_floating_point()))
    )


def _long(value: Tensor) -> int:
    """How many dimensions have more than one element."""
    return sum(size > 1 for size in value.shape)
