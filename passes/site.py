"""From labelled tensors to a Site: which axes are batch, heads, queries, keys; and how each operand is obtained."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.constants import constant
from attnopt.passes.layout import CASTS, Axes, Axis, Dims, Space, input_node, step_up
from attnopt.passes.mask_writes import is_settled, sharing, writes_after, written_by
from attnopt.passes.sizes import shape_of
from attnopt.rule import Reject
from attnopt.shadow import Shadow

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Operand:
    """How to get one canonical operand: the value of `node`, whose dimensions are `dims`, arranged and adjusted.

    factor: multiplied onto it. times: further tensors, or scalars, multiplied onto it (`inverse`: dividing it). rsqrt:
    it is divided by the square root of the length of these axes. dtype: what it is cast to first (None: left as it
    is). negated: a boolean operand is inverted first. function: what is taken of it before the factors, such as its
    natural logarithm ("log"), the logarithm of the sum of exponentials along its last dimension ("logsumexp"), or the
    "differences" of neighbours, which undo a running sum; in the end, what it is "relative" to the largest of its row;
    or how it is multiplied: what it does not keep becomes 0, even NaN ("keep"). layout: its canonical dimensions, where
    its name does not tell them. beside: further features, each laid out for itself, that stand behind its own along the
    last dimension.
    """

    node: Node
    dims: Dims
    factor: float = 1.0
    times: "tuple[Operand, ...]" = ()
    inverse: bool = False
    rsqrt: Axes = ()
    dtype: torch.dtype | None = None
    negated: bool = False
    function: Literal["", "log", "keep", "differences", "relative", "logsumexp"] = ""
    layout: tuple[Axes, ...] | None = None
    beside: "tuple[Operand, ...]" = ()

    @property
    def parts(self) -> "tuple[Operand, ...]":
        """Itself, and all that it is made with."""
        return (self, *self.times, *(part for other in self.beside for part in other.parts))


@dataclass(frozen=True, slots=True)
class Filled:
    """An operand that is one number everywhere, which no tensor of the graph holds; layout: its dimensions."""

    value: float
    layout: tuple[Axes, ...]


@dataclass(frozen=True, slots=True)
class Roles:
    """The axes of a site by what they mean; H = kv_heads x share, always grouped: head h reads kv head h // share.

    more: features behind d, of queries and keys that consist of several parts.
    """

    batch: Axes = ()
    kv_heads: Axes = ()
    share: Axes = ()
    query: Axes = ()
    key: Axes = ()
    d: Axes = ()
    dv: Axes = ()
    more: Axes = ()

    @property
    def heads(self) -> Axes:
        """The query heads."""
        return self.kv_heads + self.share

    def layout(self, name: str) -> tuple[Axes, ...]:
        """The canonical dimensions of an operand, as AttentionSpec states them."""
        match name.rstrip("0123456789"):
            case "q" | "far":
                return self.batch, self.heads, self.query, self.d
            case "k":
                return self.batch, self.kv_heads, self.key, self.d
            case "v":
                return self.batch, self.kv_heads, self.key, self.dv
            case "padding":
                return self.batch, self.key
            case "sink_logits":
                return (self.heads,)
        return self.batch, self.heads, self.query, self.key

    @property
    def output(self) -> tuple[Axes, ...]:
        """The dimensions of the kernel's output."""
        return self.batch, self.heads, self.query, self.dv


@dataclass(frozen=True, slots=True)
class Result:
    """How the kernel's output (B, H, Sq, Dv) becomes the value of the root; times: tensors multiplied onto it.

    layout: the kernel's dimensions, where it is not the output but the last state.
    """

    roles: Roles
    dims: Dims
    dtype: torch.dtype
    factor: float = 1.0
    times: tuple[Operand, ...] = ()
    layout: tuple[Axes, ...] | None = None


def assign_roles(
    space: Space, q: Dims, k: Dims, v: Dims, scores: Dims, key: Axes, per_head: Axes = ()
) -> Roles:
    """Sorts the axes of a softmax site; `scores` are the dimensions of the softmax, `key` the one it normalises.

    per_head: axes of something that has one number for each head: heads, where they could be a batch as well.
    """
    key = space.leaves(key)
    in_q, in_k, in_v = (set(flat(space, dims)) for dims in (q, k, v))
    order = [a for a in flat(space, scores) if a not in key]
    shared = [a for a in order if a in in_k | in_v]
    alone = [a for a in order if a not in in_k | in_v]
    query = _query(space, scores, key, alone)
    batch, kv_heads = _batch_and_heads(space, scores, shared)
    if len(shared) == 1 and {*shared} <= {*per_head}:
        batch, kv_heads = (), tuple(shared)
    if (in_k ^ in_v) & set(shared) and in_q >= set(shared):
        batch, kv_heads = _shared_differently(shared, in_k & in_v)
    known = {*order, *key}
    if not in_q - known <= in_k:
        raise Reject(f"queries have {len(in_q)} axes of which some meet no key")
    return Roles(
        batch, kv_heads, tuple(a for a in alone if a not in query), query, key,
        d=tuple(a for a in flat(space, q) if a in in_k and a not in known),
        dv=tuple(a for a in flat(space, v) if a not in known),
    )  # fmt: skip


def flat(space: Space, dims: Dims) -> Axes:
    """All axes of a tensor in order."""
    return tuple(a for axes in dims for a in space.leaves(axes))


def _query(space: Space, scores: Dims, key: Axes, alone: Sequence[Axis]) -> Axes:
    """The query axis: the one beside the keys, of those that keys and values lack; none for a single query."""
    if not key:
        return tuple(alone[-1:])
    places = [set(space.leaves(axes)) for axes in scores]
    at = next((n for n, place in enumerate(places) if place & set(key)), len(places))
    beside = space.leaves(scores[at - 1]) if at > 0 else ()
    if at > 0 and not beside:
        return ()
    candidates = [a for a in beside if a in alone] or list(alone)
    return tuple(candidates[-1:])


def _batch_and_heads(space: Space, scores: Dims, shared: Sequence[Axis]) -> tuple[Axes, Axes]:
    if len(shared) > 1:
        return tuple(shared[:-1]), tuple(shared[-1:])
    if shared and len(scores) > 3 and shared[0] not in space.leaves(scores[0]):
        return (), tuple(shared)
    return tuple(shared), ()


def _shared_differently(shared: Sequence[Axis], both: set[Axis]) -> tuple[Axes, Axes]:
    """Keys and values that are repeated along different axes: those are heads, along which each is copied."""
    batch = tuple(a for a in shared if a in both)[:-1]
    return batch, tuple(a for a in shared if a not in batch)


def peel(space: Space, node: Node, dims: Dims) -> tuple[Node, Dims, float]:
    """Above a query or key: through views, copies, broadcasts, upcasts and constant factors, to the tensor itself.

    A copy that is written to afterwards is not what it was copied from.
    """
    factor = 1.0
    while True:
        step = _peel_one(space, node, dims)
        if step is None or (_storage(step[0]) != _storage(node) and writes_after(node, None)):
            return node, space.resolve(dims), factor
        node, dims, number = step
        factor *= number


def _peel_one(space: Space, node: Node, dims: Dims) -> tuple[Node, Dims, float] | None:
    try:
        moved = step_up(space, node, dims)
    except Reject:
        return None
    if moved is not None:
        return *moved, 1.0
    if node.op == "call_function" and node.target in CASTS and _is_upcast(node):
        return input_node(node), dims, 1.0
    return _peel_scale(node, dims)


def _is_upcast(node: Node) -> bool:
    before, after = input_node(node).meta["val"].dtype, node.meta["val"].dtype
    floating = before.is_floating_point and after.is_floating_point
    return floating and torch.promote_types(before, after) == after


def _peel_scale(node: Node, dims: Dims) -> tuple[Node, Dims, float] | None:
    divided = node.target in (aten.div.Tensor, aten.div.Scalar)
    if not divided and node.target not in (aten.mul.Tensor, aten.mul.Scalar):
        return None
    for tensor, other in (node.args[:2], node.args[1::-1])[: 1 if divided else 2]:
        number = constant(other)
        if number and isinstance(tensor, Node) and shape_of(tensor) == shape_of(node):
            return tensor, dims, 1 / number if divided else number
    return None


def working_dtype(operands: Iterable[tuple[Node, torch.dtype]], root: torch.dtype) -> torch.dtype:
    """The dtype for q, k, v: the least that loses nothing that the graph keeps.

    operands: each base with the dtype of the contraction it enters; an upcast before the contraction adds nothing,
    autocast before it takes something away.
    """
    result = root
    for node, entered in operands:
        held = node.meta["val"].dtype
        loses = torch.promote_types(held, entered) != entered
        result = torch.promote_types(result, entered if loses else held)
    return result


def check_unmutated(operands: Mapping[str, Operand], root: Node, inner: Container[Node] = ()) -> None:
    """Operands must hold the same value at the root as where the graph reads them; an inner write reads, too."""
    for name, operand in operands.items():
        for part in operand.parts:
            writes, settled = writes_after(part.node, root), is_settled(part.node)
            late = [write for write in writes if write in inner or not settled]
            if late:
                raise Reject(f"{name} is written to in place before the attention uses it", late[0])


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else id(node)


def check_inside(
    shadow: Shadow, interior: Iterable[Node], root: Node, returned: frozenset[Node] = frozenset()
) -> None:
    """No interior value may be needed elsewhere, or returned, except for some of which it is known that they are."""
    inside = {*interior, root}
    _check_buffers(shadow, inside)
    for node in inside - {root}:
        outside = [user for user in shadow.users(node) if user not in inside]
        is_returned = node in shadow.results and (node not in returned or bool(writes_after(node, None)))
        if is_returned or outside:
            user = "returned by the graph" if is_returned else f"used by {outside[0].name}"
            raise Reject(f"an inner value of the attention ({node.name}) is also {user}", node)


def outside_uses(shadow: Shadow, interior: Iterable[Node], root: Node) -> Iterator[tuple[Node, str]]:
    """Inner values that something else needs too, each with what does, in words; Reject if they are written to."""
    inside = {*interior, root}
    _check_buffers(shadow, inside)
    for node in sorted(inside - {root}, key=lambda n: shadow.order[n]):
        outside = [user for user in shadow.users(node) if user not in inside and not _is_idle(shadow, user)]
        if node not in shadow.results and not outside:
            continue
        user = "returned by the graph" if node in shadow.results else f"used by {outside[0].name}"
        if late := writes_after(node, None):
            reason = f"an inner value of the attention ({node.name}) is written to in place, and also {user}"
            raise Reject(reason, late[0], len(inside))
        yield node, user


def _check_buffers(shadow: Shadow, inside: set[Node]) -> None:
    """A tensor into which an inner value is written, and which is none itself, must be of no use to anyone else."""
    for node in inside:
        buffer = written_by(node)
        for alias in () if buffer is None or buffer in inside else sharing(buffer) - inside:
            later = [u for u in shadow.users(alias) if u not in inside and node < u]
            if alias.op == "placeholder" or alias in shadow.results or later:
                reason = f"an inner value of the attention is written into {alias}, which is used elsewhere"
                raise Reject(reason, node, len(inside))


def _is_idle(shadow: Shadow, node: Node) -> bool:
    """Whether the node takes out one of several results, and nobody uses it."""
    return node.target is getitem and node not in shadow.results and not shadow.users(node)


def with_dtype(operand: Operand, dtype: torch.dtype) -> Operand:
    """The operand cast to `dtype` unless it has it."""
    beside = tuple(with_dtype(part, dtype) for part in operand.beside)
    cast = None if operand.node.meta["val"].dtype == dtype else dtype
    return replace(operand, dtype=cast or operand.dtype, beside=beside)
