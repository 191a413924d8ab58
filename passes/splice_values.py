"""What the nodes of a spliced call say of themselves: their value, whether it is trained, and where it comes from."""

from typing import Any

from torch import Tensor
from torch.fx import Node


def set_value(node: Node, value: Any) -> None:
    """Dynamo's graphs keep fake values as `example_value`, exported ones as `val`."""
    node.meta["val"] = value
    node.meta["example_value"] = value


def stand_for(node: Node, place: Node) -> None:
    """Says of a node what was said of the one that it is put in the place of.

    Whether autograd goes on behind a body is read off the values that it is noted to return
    (torch.compiler.nested_compile_region); those of a call that was traced never need a gradient.
    """
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in place.meta:
            node.meta[key] = place.meta[key]
    value, before = node.meta.get("val"), place.meta.get("example_value")
    if isinstance(value, Tensor) and isinstance(before, Tensor) and value.is_floating_point():
        set_value(node, value.detach().requires_grad_(before.requires_grad))
