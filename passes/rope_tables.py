"""Tables of cos and sin that a module holds: the rows that a graph takes of them, by a slice or by their numbers."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.buffers import BUFFER, HELD
from attnopt.passes.layout import CASTS, COPIES, RESHAPES
from attnopt.passes.mask_writes import arguments, operation
from attnopt.passes.sizes import Size, is_one, same, shape_of
from attnopt.shadow import CONSTANT, Shadow

#: How rows of a table are taken by their numbers.
GATHERS = frozenset({"index", "index_select", "embedding", "gather"})


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of `table` from `start` on, along `dim`: a slice, whose positions no tensor holds."""

    table: Node
    dim: int
    start: Any  # a number, or a node that holds one


def values_of(shadow: Shadow, node: Node) -> Tensor | None:
    """The elements of an input that a module or the program holds; None where they are not known."""
    meta = shadow.value_of.get(node, node).meta
    buffer = meta.get(BUFFER)
    found = [meta.get(CONSTANT), None if buffer is None else buffer.value, meta.get(HELD)]
    if node.op == "get_attr":
        found.append(getattr(node.graph.owning_module, str(node.target), None))
    return next((x for x in found if isinstance(x, Tensor) and not isinstance(x, torch.nn.Parameter)), None)


def leaf_of(node: Node) -> Node:
    """What a table is a view, a cast or a copy of."""
    while node.op == "call_function" and node.target in RESHAPES | COPIES | CASTS:
        node = node.all_input_nodes[0]
    return node


def rows_of(shadow: Shadow, node: Node, length: Size) -> Rows | None:
    """The rows that a slice takes of a held table, as many as there are queries; None for any other node."""
    if node.op != "call_function" or operation(node) not in {"slice", "narrow"}:
        return None
    held = arguments(node)
    table, dim = held["self"], int(held["dim"]) % len(shape_of(node))
    plain = (
        held.get("step", 1) == 1 and same(shape_of(node)[dim], length) and not is_one(shape_of(table)[dim])
    )
    values = values_of(shadow, leaf_of(table)) if plain else None
    if values is None or not (values.is_floating_point() or values.is_complex()):
        return None
    return Rows(table, dim, held["start"] if held["start"] is not None else 0)


@dataclass(frozen=True, eq=False)
class Unchanged:
    """A table holds what it held while compiling. As `Assumed`, whose other input it is itself."""

    base: Node
    value: Tensor

    def holds(self, value: Tensor, base: Tensor) -> bool:
        """Whether it still does."""
        del base
        return value.shape == self.value.shape and torch.equal(value, self.value.to(value.device))
