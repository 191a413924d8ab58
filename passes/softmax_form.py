"""One softmax as a value, however it is spelled: what lies between reading the scores above and the values below."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.constants import present
from attnopt.passes.layout import CASTS, Axes, Dims, Space, broadcast_up, input_node, is_copy, step_up
from attnopt.passes.mask_writes import arguments, operation, writes_after, written_by
from attnopt.passes.scores_moves import functional
from attnopt.passes.sizes import Size, same, shape_of
from attnopt.passes.terms import Cast, Fill, Term

aten = torch.ops.aten

#: The shift of a softmax has no gradient, so it may be cut off from its source.
DETACHED: frozenset[object] = frozenset({aten.detach.default})

#: A longer chain of views and casts is not a part of a softmax that somebody wrote down.
LONGEST = 40


@dataclass(frozen=True, slots=True)
class Sink:
    """exp(logit) that joins each denominator: a tensor, or a number (no term); several: an axis that is summed over."""

    term: Term | None
    value: float = 0.0
    several: Axes = ()


@dataclass(frozen=True, slots=True)
class Form:
    """weights = exp(logits) / (its sum over the keys + exp(sink)), masked by `fills`.

    start: the node with the weights, whose dimensions are `dims` (of which `key` is the one summed over). logits: the
    node that is exponentiated. inner: nodes between them, and start. casts: those below the logits. safe: a row without
    keys gives zeros. sharp: a finite fill becomes a weight of exactly 0, even where all are filled. divided: whether
    start is divided by the sum already, or what it is multiplied onto will be.
    """

    space: Space
    start: Node
    logits: Node
    dims: Dims
    key: Axes
    inner: frozenset[Node]
    casts: tuple[Cast, ...] = ()
    sink: Sink | None = None
    fills: tuple[Fill, ...] = ()
    safe: bool = False
    sharp: bool = False
    undivided: "Exponential | None" = None
    unshifted: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Exponential:
    """exp(logits - shift), or that times a mask: `node`. owns_maximum: shift is the largest logit of each row."""

    node: Node
    dims: Dims
    key: Axes
    shift: "Row | None" = None
    owns_maximum: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """A tensor without the keys, seen through views and casts: its source, labelled."""

    node: Node
    dims: Dims


@dataclass(frozen=True, slots=True)
class Reduction:
    """name (amax, sum, logsumexp) of `source` over the key axis."""

    name: str
    source: Node


def is_called(node: object) -> bool:
    """Whether a value is a call of an operator, not an input or a number."""
    return isinstance(node, Node) and node.op == "call_function"


def is_float_cast(node: Node) -> bool:
    """Whether the node changes the floating dtype only."""
    return node.op == "call_function" and node.target in CASTS and node.meta["val"].dtype.is_floating_point


def above_casts(node: Node) -> Node:
    """The tensor that a chain of casts and copies hands on."""
    while node.op == "call_function" and (is_copy(node) or is_float_cast(node)):
        node = input_node(node)
    return node


def row_of(
    space: Space, node: Node, dims: Dims, key: Axes, through: frozenset[object] = frozenset()
) -> Row | None:
    """`node`, broadcast to a tensor labelled `dims`, as a row; None if it varies along the keys.

    through: operators to look through besides views and casts.
    """
    row = broadcast_up(dims, shape_of(node))
    if set(space.leaves(key)) & {a for axes in row for a in space.leaves(axes)}:
        return None
    for _ in range(LONGEST):
        if node.op == "call_function" and (node.target in through or is_float_cast(node)):
            node = input_node(node)
        elif (moved := step_up(space, node, row)) is not None:
            node, row = moved
        else:
            break
    return Row(node, space.resolve(row))


def narrowed(space: Space, node: Node, dims: Dims, key: Axes) -> tuple[Node, Dims] | None:
    """`node`, broadcast to a tensor labelled `dims`, before it was repeated along the keys; None if it varies there.

    A condition is as good as the numbers 0 and 1 that are made of it.
    """
    keys, row = set(space.leaves(key)), broadcast_up(dims, shape_of(node))
    while keys & {a for axes in row for a in space.leaves(axes)}:
        if node.op != "call_function" or writes_after(node, None):
            return None
        if node.target in CASTS and input_node(node).meta["val"].dtype == torch.bool:
            node = input_node(node)
            continue
        moved = step_up(space, node, row)
        if moved is None:
            return None
        node, row = moved
    return node, space.resolve(row)


def truth_of(space: Space, node: Node, dims: Dims) -> tuple[Node, Dims] | None:
    """The condition that a tensor of 0 and 1 is made of, labelled; None if it is made otherwise."""
    for _ in range(LONGEST):
        if node.meta["val"].dtype == torch.bool:
            return node, space.resolve(dims)
        if node.op == "call_function" and node.target in CASTS:
            node = input_node(node)
        elif (moved := step_up(space, node, dims)) is not None:
            node, dims = moved
        else:
            break
    return None


#: Views, copies and casts: they hand on the numbers of the one tensor that they are given.
_HANDS_ON = frozenset(
    {
        "view", "reshape", "unsqueeze", "squeeze", "expand", "expand_as", "repeat", "tile", "slice", "select",
        "permute", "transpose", "mT", "unflatten", "flatten", "clone", "contiguous", "to", "_to_copy", "detach",
        "alias",
    }
)  # fmt: skip


def is_given(node: Node) -> bool:
    """Whether a tensor is a condition, or data that came in as it is, which may be 0."""
    while isinstance(made := node.meta.get("val"), Tensor) and made.dtype != torch.bool:
        if operation(node) not in _HANDS_ON:
            return node.op in ("placeholder", "get_attr")
        node = input_node(node)
    return isinstance(made, Tensor)


def reduction_of(space: Space, row: Row, dims: Dims, key: Axes) -> Reduction | None:
    """The row as a reduction over the keys of a tensor labelled `dims`; None if it is something else."""
    found = _reduced(row.node)
    if found is None:
        return None
    name, source, axes, keepdim = found
    rank = len(shape_of(source))
    if rank != len(dims) or len(axes) != 1:
        return None
    place = axes[0] % rank
    if space.leaves(dims[place]) != space.leaves(key):
        return None
    kept = (*dims[:place], *([()] if keepdim else []), *dims[place + 1 :])
    return Reduction(name, source) if space.resolve(kept) == row.dims else None


def _reduced(node: Node) -> tuple[str, Node, list[int], bool] | None:
    """Name, source, dimensions and keepdim."""
    if node.op != "call_function":
        return None
    name = _REDUCTIONS.get(node.target)
    if name is not None:
        call = arguments(node)
        axes = [call["dim"]] if isinstance(call["dim"], int) else list(call["dim"] or ())
        return name, call["self"], axes, bool(call["keepdim"])
    if _is_maximum(node):
        source, axis, *rest = node.args[0].args  # type: ignore[union-attr]
        return "amax", source, [axis], bool(rest and rest[0])  # type: ignore[return-value, list-item]
    return _single_einsum(node)


_REDUCTIONS: dict[object, str] = {
    aten.amax.default: "amax",
    aten.sum.dim_IntList: "sum",
    aten.logsumexp.default: "logsumexp",
}


def _is_maximum(node: Node) -> bool:
    """Whether the node is the values of max(x, dim)."""
    source = node.args[0] if node.args else None
    return isinstance(source, Node) and source.target == aten.max.dim and node.args[1:] == (0,)


def _single_einsum(node: Node) -> tuple[str, Node, list[int], bool] | None:
    """einsum("bhij->bhi", x) is a sum."""
    if node.target != aten.einsum.default or len(node.args[1]) != 1:  # type: ignore[arg-type]
        return None
    before, _, after = str(node.args[0]).replace(" ", "").partition("->")
    summed = [n for n, letter in enumerate(before) if letter not in after]
    ordered = "".join(letter for letter in before if letter in after) == after
    if "." in before or not ordered or len(set(before)) != len(before):
        return None
    return "sum", node.args[1][0], summed, False  # type: ignore[index, return-value]


def reduction_places(node: Node) -> tuple[str, Node, int] | None:
    """Name, source and dimension of a reduction over one dimension, whatever it is labelled; None for another node."""
    found = _reduced(node)
    if found is None or len(found[2]) != 1:
        return None
    name, source, axes, _ = found
    return name, source, axes[0] % len(shape_of(source))


def fits(size: Size, other: Size, more: int) -> bool:
    """Whether `size` is `other` and `more`, for certain."""
    return same(size, other + more)


def number(value: object) -> float | None:
    """A number, or a tensor of one element made of constants; also one that was filled with it everywhere."""
    found = present(value)
    if found is not None or not isinstance(value, Node) or value.op != "call_function":
        return found
    node = value
    for _ in range(LONGEST):
        if writes_after(node, None):
            return None
        if node.target in _FILLED:
            return _FILLED[node.target]
        if node.target in (aten.full.default, aten.new_full.default, aten.full_like.default):
            return present(node.args[1] if node.target != aten.new_full.default else node.args[2])
        if node.op != "call_function" or not (node.target in _KEPT or is_copy(node) or is_float_cast(node)):
            return None
        node = input_node(node)
    return None


_FILLED = {
    aten.zeros.default: 0.0, aten.zeros_like.default: 0.0, aten.new_zeros.default: 0.0, aten.ones.default: 1.0,
    aten.ones_like.default: 1.0, aten.new_ones.default: 1.0,
}  # fmt: skip
_KEPT = frozenset(
    {aten.expand.default, aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.slice.Tensor}
)


def onto(user: Node, node: Node) -> object:
    """The operation of a node; of one that writes in place, and to `node`, the out-of-place form."""
    return functional(user) if written_by(user) is node else user.target


def divisor_of(user: Node, node: Node) -> Node | None:
    """d, for a node that is `node` / d, or `node` * (1 / d); None for another."""
    target = onto(user, node)
    if target in (aten.div.Tensor, aten.true_divide.Tensor) and user.args[0] is node:
        return user.args[1] if isinstance(user.args[1], Node) else None
    if target == aten.mul.Tensor and node in user.args:
        other = user.args[1] if user.args[0] is node else user.args[0]
        inverse = above_casts(other) if isinstance(other, Node) else None
        if inverse is not None and inverse.target == aten.reciprocal.default:
            return input_node(inverse)
    return None
