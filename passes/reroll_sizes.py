"""Along which dimensions a node sums, or takes a tensor apart: told by sizes, which is all that spellings share."""

import operator
from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.fx import Node

from attnopt.passes.layout import RESHAPES
from attnopt.passes.mask_writes import arguments, operation
from attnopt.passes.sizes import hint, same, shape_of

#: Views that take a part out of a dimension.
TAKES = frozenset(
    {
        "slice", "select", "narrow", "split", "split_with_sizes", "unbind", "chunk", "tensor_split", "unsafe_split",
        "unsafe_chunk", "getitem", "index_select",
    }
)  # fmt: skip
#: Products that sum over an index.
CONTRACTIONS = frozenset({"matmul", "bmm", "mm", "baddbmm", "addmm", "einsum", "mv", "dot", "outer", "ger"})


def name_of(node: Node) -> str:
    """The operation; also that of an element taken out of a list of tensors."""
    return "getitem" if node.target is operator.getitem else operation(node)


def seen_shape(node: Node) -> tuple[int, ...]:
    """The sizes of a tensor, symbolic ones as seen while tracing; equal lengths have many symbolic forms.

    () for anything else.
    """
    value = node.meta.get("val")
    return tuple(map(hint, value.shape)) if isinstance(value, Tensor) else ()


def taken_dim(node: Node) -> int | None:
    """The dimension that a slice, select or split takes apart; None if it keeps all of it, or is something else."""
    name = name_of(node)
    if name not in TAKES or name == "getitem" or not node.all_input_nodes:
        return None
    source = node.all_input_nodes[0]
    if not isinstance(source.meta.get("val"), Tensor):
        return None
    before = shape_of(source)
    dim = int(arguments(node).get("dim", 0)) % max(len(before), 1)
    return None if name == "slice" and same(shape_of(node)[dim], before[dim]) else dim


def taken_sizes(node: Node) -> frozenset[int]:
    """The sizes of the dimensions that a node takes apart: by a part of one, or a view by chunks."""
    dim = taken_dim(node)
    if dim is not None:
        return frozenset(seen_shape(node.all_input_nodes[0])[dim : dim + 1])
    if node.target not in RESHAPES:
        return frozenset()
    before, after = seen_shape(node.all_input_nodes[0]), seen_shape(node)
    if len(after) <= len(before):
        return frozenset()
    kept = set(_places(after))
    return frozenset(size for rest, size in _places(before) if (rest, size) not in kept)


def _places(shape: Sequence[int]) -> list[tuple[int, int]]:
    """Each dimension with the product of those behind it."""
    places: list[tuple[int, int]] = []
    rest = 1
    for size in reversed(shape):
        places.append((rest, size))
        rest = rest * size
    return places


def summed_sizes(node: Node) -> frozenset[int]:
    """The sizes of the dimensions that a product or a sum sums over."""
    name = name_of(node)
    if name == "sum":
        shape, dims = seen_shape(node.all_input_nodes[0]), arguments(node).get("dim")
        return frozenset(shape[d] for d in (dims or range(len(shape))))
    if name == "einsum":
        return frozenset(_summed_by_letters(str(node.args[0]), list(map(seen_shape, node.all_input_nodes))))
    if name not in CONTRACTIONS or name in ("outer", "ger"):
        return frozenset()
    left = node.args[1] if name in ("baddbmm", "addmm") else node.args[0]
    return frozenset(seen_shape(left)[-1:]) if isinstance(left, Node) else frozenset()


def _summed_by_letters(equation: str, shapes: Sequence[tuple[int, ...]]) -> Iterator[int]:
    """The sizes of the letters that an einsum's result lacks."""
    given, _, made = equation.replace(" ", "").partition("->")
    for term, shape in zip(given.split(","), shapes, strict=False):
        before, _, after = term.partition("...")
        ends = zip(after[::-1], shape[::-1], strict=False)
        for letter, size in (*zip(before, shape, strict=False), *ends):
            if letter not in made:
                yield size


def coupled_sizes(node: Node) -> frozenset[int]:
    """The sizes of the dimensions along which elements meet or part: summed, taken apart, made longer or shorter."""
    name = name_of(node)
    if name in ("slice", "constant_pad_nd", "pad"):
        pairs = zip(seen_shape(node.all_input_nodes[0]), seen_shape(node), strict=True)
        return frozenset(size for pair in pairs if pair[0] != pair[1] for size in pair)
    if name == "cumsum":
        shape = seen_shape(node)
        return frozenset(shape[arguments(node)["dim"]] for _ in shape[:1])
    return summed_sizes(node) | taken_sizes(node)
