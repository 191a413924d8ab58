"""Where positions enter a tensor: the operations above it that may turn it, and the leaves at which those begin.

The walk goes up through views, sums, products and the smooth functions of which rotary tables are made (arXiv
2104.09864). What it does not know, such as a projection, it takes as data.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.mask_writes import arguments, operation, writes_after
from attnopt.passes.rope_tables import GATHERS, Rows, rows_of
from attnopt.passes.sizes import Size, is_one, shape_of
from attnopt.rule import Reject
from attnopt.shadow import Shadow, mutates

#: Operations that move elements, or are linear in them: of data, and of tables.
LINEAR = frozenset(
    {
        "alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy", "to", "_to_copy", "type_as",
        "expand", "expand_as", "broadcast_to", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as",
        "reshape_as", "squeeze", "unsqueeze", "ravel", "_reshape_alias", "transpose", "permute", "swapaxes", "swapdims",
        "movedim", "moveaxis", "t", "numpy_T", "mT", "adjoint", "slice", "narrow", "select", "split", "chunk",
        "split_with_sizes", "unbind", "tensor_split", "cat", "concat", "stack", "flip", "repeat", "tile",
        "repeat_interleave", "add", "sub",
        "rsub", "neg", "mul", "multiply", "addcmul", "view_as_real", "view_as_complex", "complex", "real", "imag",
        "conj", "_conj", "resolve_conj", "resolve_neg", "_neg_view",
    }
)  # fmt: skip
#: Smooth functions of positions, of which tables are made.
SMOOTH = frozenset(
    {"cos", "sin", "polar", "exp", "div", "pow", "reciprocal", "log", "sqrt", "rsqrt", "square"}
)
#: What is done to positions that count a padding mask: sums, other numbers for the padding, and views.
MENDED = frozenset(
    {
        "masked_fill",
        "where",
        "clamp",
        "clamp_min",
        "add",
        "sub",
        "to",
        "_to_copy",
        "slice",
        "view",
        "unsqueeze",
    }
)
#: Products, as long as nothing is summed: positions times frequencies.
OUTER = frozenset({"matmul", "bmm", "mm", "outer", "ger", "einsum"})


@dataclass(frozen=True)
class Slice:
    """nodes: what makes the roots of the leaves, in order. leaves: tensors and sizes at which it begins.

    sources: leaves of whole numbers, and what counts up, that may be positions; and `rows` of tables, which stand for
    theirs.
    """

    roots: tuple[Node, ...]
    nodes: tuple[Node, ...]
    leaves: tuple[Node, ...]
    sources: tuple[Node, ...]
    rows: Mapping[Node, Rows]

    @cached_property
    def moving(self) -> frozenset[Node]:
        """Nodes with a source above them."""
        return self.below(self.sources)

    def below(self, nodes: Iterable[Node]) -> frozenset[Node]:
        """Nodes of the slice that depend on some of `nodes`."""
        found = set(nodes)
        for node in self.nodes:
            if not found.isdisjoint(node.all_input_nodes):
                found.add(node)
        return frozenset(found.intersection(self.nodes))

    def above(self, nodes: Iterable[Node]) -> frozenset[Node]:
        """Nodes and leaves of the slice on which some of `nodes` depend."""
        inside, found = {*self.nodes, *self.leaves}, set[Node]()
        pending = [n for node in nodes for n in node.all_input_nodes]
        while pending:
            node = pending.pop()
            if node in inside and node not in found:
                found.add(node)
                pending.extend(node.all_input_nodes)
        return frozenset(found)

    @cached_property
    def tables(self) -> frozenset[Node]:
        """Nodes and leaves of which cos, sin and rows of tables are made; what else there is, is data."""
        ends = [n for n in self.moving if operation(n) in SMOOTH | GATHERS]
        return self.above(ends)

    @property
    def data(self) -> list[Node]:
        """Leaves that hold what is turned, or multiplied onto it."""
        return [n for n in self.leaves if is_float(n) and n not in self.tables and n not in self.rows]

    @cached_property
    def looked_up(self) -> frozenset[Node]:
        """Leaves that are tables, of which positions choose the rows."""
        taken = {n.all_input_nodes[0] for n in self.moving if operation(n) in GATHERS}
        return (self.above(taken) | taken) & {n for n in self.leaves if is_float(n)}


def slice_above(shadow: Shadow, roots: tuple[Node, ...], end: Node, length: Size) -> Slice:
    """What makes `roots`, which `end` reads. Reject where something in it is written to in place.

    length: how many queries there are.
    """
    found = _walk(shadow, roots, frozenset(), length)
    counting = found.below(found.sources)
    # Smooth functions of data alone, as in a norm, are data.
    data = frozenset(n for n in found.nodes if operation(n) in SMOOTH and n not in counting)
    found = _walk(shadow, roots, data, length) if data else found
    for node in (*found.nodes, *found.leaves):
        if is_tensor(node) and (late := writes_after(node, end)):
            raise Reject(f"{node.name}, of which queries and keys are made, is written to in place", late[0])
    return found


def _walk(shadow: Shadow, roots: tuple[Node, ...], ends: frozenset[Node], length: Size) -> Slice:
    """Everything above `roots`, up to `ends`, or to what is not known."""
    inner, leaves = set[Node](), set[Node]()
    rows: dict[Node, Rows] = {}
    pending = [*roots]
    while pending:
        node = pending.pop()
        if node in inner or node in leaves:
            continue
        taken = rows_of(shadow, node, length)
        if taken is not None:
            rows[node] = taken
        if taken is not None or node in ends or _begins(node):
            leaves.add(node)
            continue
        inner.add(node)
        pending.extend(node.all_input_nodes)
    nodes, found = (tuple(sorted(part, key=shadow.order.__getitem__)) for part in (inner, leaves))
    return Slice(roots, nodes, found, tuple(node for node in found if node in rows or _may_count(node)), rows)


def _begins(node: Node) -> bool:
    """Whether the walk ends here."""
    if node.op != "call_function" or _is_scalar(node) or is_count(node):
        return True
    name = operation(node) or getattr(node.target, "__name__", "")
    if name in OUTER:
        return not _is_outer(node)
    if mutates(node):
        return True
    if name in GATHERS:
        return not _gathers(node)
    return _truncates(node) or not (name in LINEAR | SMOOTH or name == "getitem")


def _truncates(node: Node) -> bool:
    """Whether real numbers become whole ones."""
    return is_tensor(node) and not is_float(node) and any(map(is_float, node.all_input_nodes))


def _is_scalar(node: Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat)


def _is_outer(node: Node) -> bool:
    """Whether each element is one product: everything that comes in has no more elements than what comes out."""
    *_, k = shape_of(node.all_input_nodes[0]) or (1,)
    if operation(node) in {"outer", "ger"}:
        return True
    if operation(node) == "einsum":
        letters, _, out = str(node.args[0]).replace(" ", "").partition("->")
        return bool(out) and set(letters) - {","} <= set(out)
    return is_one(k)


def _gathers(node: Node) -> bool:
    """Whether whole numbers choose rows of a tensor."""
    chosen = [n for n in node.all_input_nodes if is_tensor(n) and not is_float(n)]
    return len(chosen) == 1 and chosen[0].meta["val"].dtype != torch.bool


def _may_count(node: Node) -> bool:
    """Whether a leaf may hold positions: what counts up, and whole numbers that come from outside."""
    if operation(node) == "arange" or is_count(node):
        return True
    return is_whole(node) and (node.op == "placeholder" or _counts_tokens(node))


def is_count(node: Node) -> bool:
    """Whether the node counts up by one: `arange`, that from a number on that a tensor holds, or one row of either."""
    held, name = arguments(node), operation(node)
    if name in {"unsqueeze", "view", "reshape"} and is_tensor(node):
        above, is_row = held["self"], name != "unsqueeze" or held["dim"] in (0, -2)
        return is_row and shape_of(node) == (1, *shape_of(above)[:1]) and is_count(above)
    if name == "arange":
        return held.get("step", 1) == 1
    if name != "add" or mutates(node):
        return False
    both = [held["self"], held["other"]]
    counts = [n for n in both if isinstance(n, Node) and is_count(n)]
    return (
        len(counts) == 1 and held["alpha"] == 1 and all(_is_whole_number(n) for n in both if n not in counts)
    )


def _is_whole_number(given: Any) -> bool:
    """Whether it is one whole number, by itself or in a tensor without dimensions."""
    value = given.meta.get("val") if isinstance(given, Node) else given
    if isinstance(value, Tensor):
        return value.dim() == 0 and not is_float(given) and value.dtype != torch.bool
    return isinstance(value, int | torch.SymInt)


def _counts_tokens(node: Node) -> bool:
    """Whether whole numbers are a running sum, or one to which something is done where it counts padding."""
    while operation(node) in MENDED and node.all_input_nodes:
        node = next((n for n in node.all_input_nodes if is_whole(n)), node.all_input_nodes[0])
    return operation(node) == "cumsum"


def is_whole(node: Node) -> bool:
    """Whether the node makes a tensor of whole numbers."""
    if not is_tensor(node) or node.meta["val"].dim() == 0:
        return False
    dtype = node.meta["val"].dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def is_tensor(node: Node) -> bool:
    """Whether the node makes a tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def is_float(node: Node) -> bool:
    """Whether the node makes a tensor of real or complex numbers, but for `arange`."""
    if not is_tensor(node) or operation(node) == "arange":
        return False
    dtype = node.meta["val"].dtype
    return bool(dtype.is_floating_point or dtype.is_complex)
