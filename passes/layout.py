"""Named dimensions: which axes each dimension of a tensor is made of, through views, permutations and broadcasts.

An `Axis` is one index of the site (a batch, a head, a query position, a feature, ...). A dimension of a tensor is a
product of axes, major first; a dimension of size 1 has none. Following a view upwards or downwards only moves axes
around, and may show that an axis is itself a product; `Space` remembers those splits, so every tensor labelled with
it learns of them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from typing import Any, cast

import torch
from torch.fx import Node

from attnopt.passes.sizes import Size, divide, is_one, product, same, shape_of, size_of
from attnopt.rule import Reject

aten = torch.ops.aten


@dataclass(frozen=True, eq=False, slots=True)
class Axis:
    """One index of a site; two axes are the same only if they are the same object."""

    size: Size


Axes = tuple[Axis, ...]
Dims = tuple[Axes, ...]


@dataclass(slots=True)
class Space:
    """The axes of one site while it is being read."""

    parts: dict[Axis, Axes] = field(default_factory=dict)

    def fresh(self, size: Size) -> Axes:
        """A dimension of its own: one new axis, none for size 1."""
        return () if is_one(size) else (Axis(size),)

    def leaves(self, axes: Axes) -> Axes:
        """`axes` with every split applied."""
        return tuple(
            chain.from_iterable(self.leaves(self.parts[a]) if a in self.parts else (a,) for a in axes)
        )

    def resolve(self, dims: Dims) -> Dims:
        """`dims` with every split applied."""
        return tuple(self.leaves(axes) for axes in dims)

    def split(self, axis: Axis, sizes: Sequence[Size]) -> Axes:
        """Declares `axis` a product of new axes, major first."""
        self.parts[axis] = tuple(Axis(size) for size in sizes)
        return self.parts[axis]


def regroup(space: Space, axes: Axes, sizes: Sequence[Size], node: Node) -> Dims:
    """The same elements in the same order, as dimensions of the given sizes; splits axes where a boundary cuts one."""
    pending = list(reversed(space.leaves(axes)))
    try:
        dims = tuple(_take(space, pending, size, node) for size in sizes)
    except Reject:
        dims = _between_equal_ends(space, space.leaves(axes), sizes)
        if not dims:
            raise
        pending = []
    if pending:
        raise Reject("a view does not keep whole dimensions apart", node)
    return dims


def _between_equal_ends(space: Space, axes: Axes, sizes: Sequence[Size]) -> Dims:
    """What sizes do not tell, the number of elements does: between equal ends, one becomes several, or several one.

    () where it does not tell either.
    """
    kept = [size for size in sizes if not is_one(size)]
    tail = _equal(reversed(axes), reversed(kept))
    head = _equal(axes[: len(axes) - tail], kept[: len(kept) - tail])
    inner, cut = axes[head : len(axes) - tail], kept[head : len(kept) - tail]
    if len(cut) == 1 and inner:
        middle: Dims = (inner,)
    elif len(inner) == 1 and cut:
        middle = tuple((axis,) for axis in space.split(inner[0], cut))
    else:
        return ()
    found = iter([*((a,) for a in axes[:head]), *middle, *((a,) for a in axes[len(axes) - tail :])])
    return tuple(() if is_one(size) else next(found) for size in sizes)


def _equal(axes: Iterable[Axis], sizes: Iterable[Size]) -> int:
    """How many of the first are equal for certain."""
    pairs = zip(axes, sizes, strict=False)
    return sum(1 for _ in takewhile(lambda pair: same(pair[0].size, pair[1]), pairs))


def _take(space: Space, pending: list[Axis], size: Size, node: Node) -> Axes:
    group: list[Axis] = []
    while not same(have := product(a.size for a in group), size):
        need = divide(size, have)
        if not pending or need is None:
            raise Reject("a view does not keep whole dimensions apart", node)
        axis = pending.pop()
        if divide(need, axis.size) is not None:
            group.append(axis)
            continue
        rest = divide(axis.size, need)
        if rest is None:
            raise Reject("a view cuts a dimension at a place that its size does not tell", node)
        major, minor = space.split(axis, (need, rest))
        group.append(major)
        pending.append(minor)
    return tuple(group)


RESHAPES = frozenset(
    {
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
        aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
        aten.view_as.default, aten.reshape_as.default, aten._reshape_alias.default, aten.ravel.default,
    }
)  # fmt: skip
COPIES = frozenset(
    {
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        aten.lift_fresh_copy.default,
        aten.resolve_conj.default,
    }
)
EXPANDS = frozenset({aten.expand.default, aten.expand_as.default, aten.broadcast_to.default})
DROPOUTS = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.native_dropout.default})
CASTS = frozenset(
    {
        aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten._to_copy.default, aten.type_as.default,
        aten.float.default if hasattr(aten, "float") else aten.to.dtype,
    }
)  # fmt: skip


def permutation(node: Node) -> tuple[int, ...] | None:
    """For a node that reorders dimensions: out dimension k is input dimension p[k]; None for any other node."""
    reader = _PERMUTATIONS.get(node.target)
    if reader is None:
        return None
    rank = len(shape_of(node))
    return reader(rank, node)


def _swapped(rank: int, a: int, b: int) -> tuple[int, ...]:
    order = list(range(rank))
    order[a % rank], order[b % rank] = order[b % rank], order[a % rank]
    return tuple(order)


def _moved(rank: int, node: Node) -> tuple[int, ...]:
    source, target = ([d] if isinstance(d, int) else list(d) for d in node.args[1:3])  # type: ignore[arg-type]
    to = {t % rank: s % rank for s, t in zip(source, target, strict=True)}
    rest = iter(d for d in range(rank) if d not in to.values())
    return tuple(to[k] if k in to else next(rest) for k in range(rank))


def _listed(rank: int, node: Node) -> tuple[int, ...]:
    return tuple(int(d) % rank for d in node.args[1])  # type: ignore[union-attr, arg-type]


def _named_swap(rank: int, node: Node) -> tuple[int, ...]:
    return _swapped(rank, int(node.args[1]), int(node.args[2]))  # type: ignore[arg-type]


_PERMUTATIONS: dict[object, Callable[[int, Node], tuple[int, ...]]] = {
    aten.permute.default: _listed,
    aten.transpose.int: _named_swap,
    aten.swapaxes.default: _named_swap,
    aten.swapdims.default: _named_swap,
    aten.movedim.int: _moved,
    aten.movedim.intlist: _moved,
    aten.moveaxis.int: _moved,
    aten.moveaxis.intlist: _moved,
    aten.t.default: lambda rank, _: tuple(reversed(range(rank))),
    aten.numpy_T.default: lambda rank, _: tuple(reversed(range(rank))),
    aten.mT.default: lambda rank, _: _swapped(rank, -1, -2),
    aten.adjoint.default: lambda rank, _: _swapped(rank, -1, -2),
}


def is_copy(node: Node) -> bool:
    """Whether the node hands its first argument on unchanged: a clone, a cast to the same dtype, dropout in eval."""
    if node.target in COPIES:
        return True
    if node.target == aten.repeat.default:
        return _same_shape(shape_of(node), shape_of(input_node(node)))
    if node.target in DROPOUTS:
        return dropout_rate(node) == 0.0
    return node.target in CASTS and node.meta["val"].dtype == input_node(node).meta["val"].dtype


def dropout_rate(node: Node) -> float:
    """The probability with which a dropout node drops; 0 in eval mode."""
    p, train = node.args[1], node.args[2] if len(node.args) > 2 else True
    return float(p) if train else 0.0  # type: ignore[arg-type]


def input_node(node: Node) -> Node:
    """The tensor that a unary node acts on."""
    first = node.args[0]
    if not isinstance(first, Node):
        raise Reject("an operation on a constant where a tensor was expected", node)
    return first


def step_up(space: Space, node: Node, dims: Dims) -> tuple[Node, Dims] | None:
    """Through one view: its input and the labels of the input, given the labels of its output. None: not a view."""
    if node.op != "call_function":
        return None
    if is_copy(node):
        return input_node(node), dims
    if node.target in RESHAPES:
        source = input_node(node)
        return source, regroup(space, tuple(chain.from_iterable(dims)), shape_of(source), node)
    if node.target in EXPANDS:
        return input_node(node), broadcast_up(dims, shape_of(input_node(node)))
    if (order := permutation(node)) is not None:
        return input_node(node), tuple(dims[order.index(k)] for k in range(len(order)))
    return _repeat_up(space, node, dims)


def broadcast_up(dims: Dims, shape: Sequence[Size]) -> Dims:
    """Labels of an operand of the given shape that is broadcast to a tensor with the labels `dims`, or Reject."""
    if len(shape) > len(dims):
        raise Reject(f"a tensor of {len(dims)} dimensions is broadcast to one of {len(shape)}")
    aligned = dims[len(dims) - len(shape) :]
    return tuple(() if is_one(size) else axes for axes, size in zip(aligned, shape, strict=True))


def _repeat_up(space: Space, node: Node, dims: Dims) -> tuple[Node, Dims] | None:
    """Through `repeat`, `tile` (whole copies one after the other) and `repeat_interleave` (each element n times)."""
    if node.target in (aten.repeat.default, aten.tile.default):
        source = input_node(node)
        aligned = dims[len(dims) - len(shape_of(source)) :]
        given: list[Size] = [1] * len(aligned) + [_count(n) for n in cast(Sequence[Any], node.args[1])]
        counts = given[len(given) - len(aligned) :]
        pairs = zip(aligned, counts, shape_of(source), strict=True)
        return source, tuple(regroup(space, axes, (n, size), node)[1] for axes, n, size in pairs)
    if (
        node.target == aten.repeat_interleave.self_int
        and len(node.args) > 2
        and isinstance(node.args[1], int)
    ):
        source, n, dim = input_node(node), node.args[1], node.args[2]
        at = int(dim) % len(dims)  # type: ignore[arg-type]
        kept = regroup(space, dims[at], (shape_of(source)[at], n), node)[0]
        return source, (*dims[:at], kept, *dims[at + 1 :])
    return None


def _count(given: Any) -> Size:
    """How often something is repeated: a number, or a node that holds a size."""
    return size_of(given.meta["val"]) if isinstance(given, Node) else size_of(given)


def step_down(space: Space, node: Node, dims: Dims) -> Dims | None:
    """Through one view: the labels of its output, given those of its input. None: not a view that keeps all axes."""
    if is_copy(node):
        return dims
    if node.target in RESHAPES:
        return regroup(space, tuple(chain.from_iterable(dims)), shape_of(node), node)
    if (order := permutation(node)) is not None:
        return tuple(dims[p] for p in order)
    if node.target in EXPANDS and _same_shape(shape_of(node), shape_of(input_node(node))):
        return dims
    return None


def _same_shape(a: Sequence[Size], b: Sequence[Size]) -> bool:
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
