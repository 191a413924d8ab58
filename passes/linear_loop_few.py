"""Dimensions of which a trial of a loop needs few elements, because the loop treats all of them alike.

Where nothing in a loop sums over a dimension, cuts it, orders it or numbers it, as batch, heads and the features of
values, every operation commutes with taking some of its elements: an element of the result comes from the same element
of what enters, by a function that is the same for all. Few elements then say what all do. What an operation does to
each dimension is told by a rule for it; a dimension that meets an operation without one keeps its size.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torch.fx import Node

from attnopt.passes.layout import CASTS, COPIES, EXPANDS, RESHAPES, permutation
from attnopt.passes.linear_loop_alike import Alike, Shapes, Spot, shape
from attnopt.passes.linear_loop_tables import Table
from attnopt.passes.mask_writes import arguments
from attnopt.passes.reroll_cut import Region
from attnopt.passes.reroll_facts import COMPARES
from attnopt.passes.reroll_sizes import name_of, taken_dim
from attnopt.passes.sizes import Size, is_one, product


def few(region: Region, tables: Sequence[Table]) -> Shapes:
    """The shapes of all tensors of a region whose dimensions can be cut short, cut short."""
    alike = Alike()
    for table in tables:
        alike.broadcast(table.base, table.node)
        alike.keep(table.node, (d for d, slope in enumerate(table.slopes) if slope))
    for node in region.nodes:
        rule = _rule(node)
        if rule is None:
            alike.keep_all((node, *node.all_input_nodes))
        else:
            rule(alike, node)
    alike.keep(region.root, [region.dim])
    return alike.shapes(dict.fromkeys((*region.leaves, *(t.base for t in tables), *region.nodes)))


Rule = Callable[[Alike, Node], None]


def _rule(node: Node) -> Rule | None:
    """What says which dimensions of a node's result are those of its inputs."""
    if node.target in RESHAPES and name_of(node) != "_reshape_alias":  # its strides are those of the graph
        return _reshape
    if node.target in COPIES | EXPANDS | CASTS:
        return _copy
    return _permute if permutation(node) is not None else _RULES.get(name_of(node))


def _made(alike: Alike, node: Node) -> None:
    """The same number everywhere."""
    del alike, node


def _pointwise(alike: Alike, node: Node) -> None:
    for source in node.all_input_nodes:
        alike.broadcast(source, node)


def _copy(alike: Alike, node: Node) -> None:
    alike.broadcast(node.all_input_nodes[0], node)
    if name_of(node) == "expand_as":
        alike.broadcast(node.all_input_nodes[-1], node)


def _permute(alike: Alike, node: Node) -> None:
    for d, origin in enumerate(permutation(node) or ()):
        alike.join((node, d), (node.all_input_nodes[0], origin))


def _reshape(alike: Alike, node: Node) -> None:
    """A dimension with as many elements behind it as before is the same one."""
    source = node.all_input_nodes[0]
    before, after = _places(source), _places(node)
    for place in before.keys() & after.keys():
        alike.join(after[place], before[place])
    alike.keep_spots(
        spot for place, spot in (before | after).items() if place not in before or place not in after
    )
    if name_of(node) in ("view_as", "reshape_as"):
        alike.broadcast(node.all_input_nodes[-1], node)


def _places(node: Node) -> dict[tuple[Size, Size], Spot]:
    """Each dimension by its size and the number of elements behind it."""
    sizes = shape(node)
    return {(size, product(sizes[d + 1 :])): (node, d) for d, size in enumerate(sizes) if not is_one(size)}


def _matmul(alike: Alike, node: Node) -> None:
    *added, left, right = _tensors(node)
    rank, rows, columns = len(shape(node)), len(shape(left)), len(shape(right))
    if min(rank, rows, columns) < 2:
        alike.keep_all((node, left, right, *added))
        return
    alike.broadcast_dims([(left, d) for d in range(rows - 2)], node, rank - 2)
    alike.broadcast_dims([(right, d) for d in range(columns - 2)], node, rank - 2)
    alike.join((node, rank - 2), (left, rows - 2))
    alike.join((node, rank - 1), (right, columns - 1))
    alike.keep_spots([(left, rows - 1), (right, columns - 2)])
    for each in added:
        alike.broadcast(each, node)


def _tensors(node: Node) -> list[Node]:
    """The tensors that a node takes, in the order of its arguments; one that it takes twice is there twice."""
    given = (value for value in arguments(node).values() if isinstance(value, Node))
    return [value for value in given if isinstance(value.meta.get("val"), Tensor)]


def _einsum(alike: Alike, node: Node) -> None:
    equation, operands = str(node.args[0]).replace(" ", ""), list(node.args[1])  # type: ignore[arg-type]
    terms, arrow, made = equation.partition("->")
    lettered = [_letters(term, n) for term, n in zip(terms.split(","), operands, strict=True)]
    results = _letters(made, node)
    if not arrow or any(len(set(letters)) < len(letters) for letters in lettered):
        alike.keep_all((node, *operands))
        return
    for operand, letters in zip(operands, lettered, strict=True):
        for d, letter in enumerate(letters):
            if letter in results:
                alike.join((node, results.index(letter)), (operand, d))
            else:
                alike.keep(operand, [d])


def _letters(term: str, node: Node) -> list[str]:
    """A name for each dimension; those under an ellipsis are counted from the last one."""
    first, dots, last = term.partition("...")
    more = len(shape(node)) - len(first) - len(last) if dots else 0
    return [*first, *(str(n) for n in reversed(range(more))), *last]


def _sum(alike: Alike, node: Node) -> None:
    (source,), held = node.all_input_nodes, arguments(node)
    dims = held.get("dim")
    summed = _all_of(dims, source) if dims else set(range(len(shape(source))))
    alike.keep(source, summed)
    _match(alike, node, source, set() if held.get("keepdim") else summed)


def _select(alike: Alike, node: Node) -> None:
    source = node.all_input_nodes[0]
    dropped = _all_of(arguments(node)["dim"], source)
    alike.keep(source, dropped)
    _match(alike, node, source, dropped)


def _along(alike: Alike, node: Node) -> None:
    """Something happens along one dimension, such as a running sum; the others stay."""
    source = node.all_input_nodes[0]
    for each in (source, node):
        alike.keep(each, _all_of(arguments(node)["dim"], each))
    _match(alike, node, source, set())


def _slice(alike: Alike, node: Node) -> None:
    if taken_dim(node) is None and arguments(node)["step"] == 1:
        _copy(alike, node)
    else:
        _along(alike, node)


def _part(alike: Alike, node: Node) -> None:
    """One tensor of a list."""
    parted = node.all_input_nodes[0]
    if name_of(parted) not in _LISTS:
        alike.keep_all((node,))
        return
    source = parted.all_input_nodes[0]
    dims = _all_of(arguments(parted).get("dim", 0), source)
    alike.keep(source, dims)
    _match(alike, node, source, dims if name_of(parted) == "unbind" else set())


def _joined(alike: Alike, node: Node) -> None:
    dims = _all_of(arguments(node)["dim"], node)
    alike.keep(node, dims)
    for source in node.all_input_nodes:
        if len(shape(source)) == len(shape(node)):
            alike.keep(source, dims)
            _match(alike, node, source, set())
        else:
            alike.keep_all((node, source))


def _stack(alike: Alike, node: Node) -> None:
    (new,) = _all_of(arguments(node)["dim"], node)
    alike.keep(node, [new])
    for source in node.all_input_nodes:
        for d in range(len(shape(source))):
            alike.join((node, d + (d >= new)), (source, d))


def _triangle(alike: Alike, node: Node) -> None:
    alike.keep(node, [-1, -2])
    _copy(alike, node)


def _pad(alike: Alike, node: Node) -> None:
    source = node.all_input_nodes[0]
    padded = range(-(len(arguments(node)["pad"]) // 2), 0)
    for each in (source, node):
        alike.keep(each, padded)
    _match(alike, node, source, set())


def _all_of(dims: int | Sequence[int], node: Node) -> set[int]:
    """Dimensions counted from the first one."""
    rank = len(shape(node))
    return {d % rank for d in ([dims] if isinstance(dims, int) else dims)}


def _match(alike: Alike, node: Node, source: Node, without: set[int]) -> None:
    """The dimensions of `source`, but for some, are those of `node`, in order."""
    left = (d for d in range(len(shape(source))) if d not in without)
    for d, origin in enumerate(left):
        alike.join((node, d), (source, origin))


#: What makes a list of tensors, each of which says by itself what it is of the whole.
_LISTS = ("split", "split_with_sizes", "chunk", "tensor_split", "unbind")
_FILLED = (
    "zeros",
    "ones",
    "full",
    "empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty",
    "scalar_tensor",
)
_ELEMENTWISE = (
    "add", "sub", "rsub", "mul", "div", "neg", "exp", "exp2", "pow", "masked_fill", "where", "copy", "zero", "fill",
    "addcmul", "multiply", "divide", "subtract", "reciprocal", "log", "clamp", "clamp_min", "clamp_max", "abs",
    "maximum", "minimum", "zeros_like", "ones_like", "full_like", "empty_like", *COMPARES,
)  # fmt: skip
_RULES: Mapping[str, Rule] = {
    **dict.fromkeys(_FILLED, _made), **dict.fromkeys(_ELEMENTWISE, _pointwise),
    **dict.fromkeys(("matmul", "bmm", "mm", "baddbmm", "addmm"), _matmul), "einsum": _einsum, "sum": _sum,
    **dict.fromkeys(("cumsum", "cumprod", "narrow"), _along), "slice": _slice, "select": _select, "getitem": _part,
    "cat": _joined, "concat": _joined, "stack": _stack, **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(("constant_pad_nd", "pad"), _pad), **dict.fromkeys(_LISTS, _made),
}  # fmt: skip
