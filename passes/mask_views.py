"""Rules for operations that only move elements: the index into the result becomes an index into the input."""

import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import sympy
from torch.fx import Node

from attnopt.passes.mask_formula import Cases, Formula, Index, NotUnderstood
from attnopt.passes.mask_reader import At, Rule, Value, as_numbers, broadcast
from attnopt.passes.mask_regroup import regrouped
from attnopt.passes.mask_writes import arguments, operation, start_of
from attnopt.passes.sizes import is_one, shape_of

ZERO = sympy.Integer(0)


def _source(at: At) -> Node:
    source = at.args["self"]
    if not isinstance(source, Node):
        raise NotUnderstood
    return source


def _dim(value: int, rank: int) -> int:
    return value % rank if rank else 0


def _same(at: At) -> Index:
    return at.index


def _broadcast(at: At) -> Index:
    return broadcast(at.index, at.shape, shape_of(_source(at)))


def _unsqueeze(at: At) -> Index:
    dim = _dim(at.args["dim"], len(at.index))
    return at.index[:dim] + at.index[dim + 1 :]


def _swap(at: At, a: int, b: int) -> Index:
    index = list(at.index)
    index[a], index[b] = index[b], index[a]
    return tuple(index)


def _transpose(at: At) -> Index:
    first, second = ("dim0", "dim1") if "dim0" in at.args else ("axis0", "axis1")
    return _swap(at, at.args[first], at.args[second])


def _permute(at: At) -> Index:
    rank = len(at.index)
    order = [_dim(d, rank) for d in at.args["dims"]]
    return tuple(at.index[order.index(k)] for k in range(rank))


def _slice(at: At) -> Index:
    dim = _dim(at.args["dim"], len(at.index))
    start = start_of(at.args["start"], at.size(_source(at), dim))
    if start is None:
        raise NotUnderstood
    return _moved(at.index, dim, start + at.integer(at.args.get("step", 1)) * at.index[dim])


def _select(at: At) -> Index:
    dim = _dim(at.args["dim"], len(at.index) + 1)
    chosen = start_of(at.args["index"], at.size(_source(at), dim))
    if chosen is None:
        raise NotUnderstood
    return (*at.index[:dim], chosen, *at.index[dim:])


def _flip(at: At) -> Index:
    index = at.index
    for d in at.args["dims"]:
        dim = _dim(d, len(index))
        index = _moved(index, dim, at.size(_source(at), dim) - 1 - index[dim])
    return index


def _moved(index: Index, dim: int, to: sympy.Expr) -> Index:
    return (*index[:dim], to, *index[dim + 1 :])


def _reshape(at: At) -> Index:
    """Dimensions of size 1 come or go, all others keep their order; some may become one, and one may become several."""
    if _source(at).meta["val"].dtype != at.node.meta["val"].dtype:  # view(dtype) reads the bits anew
        raise NotUnderstood
    kept = [(e, size) for e, size in zip(at.index, at.shape, strict=True) if not is_one(size)]
    source = shape_of(_source(at))
    indices = iter(regrouped(kept, [size for size in source if not is_one(size)]))
    ones = iter(e for e, size in zip(at.index, at.shape, strict=True) if is_one(size))
    return tuple(next(ones, ZERO) if is_one(size) else next(indices) for size in source)


def _repeat(at: At) -> Index:
    """Only where the repeated dimensions have size 1."""
    source = shape_of(_source(at))
    counts = list(at.args["repeats"] if "repeats" in at.args else at.args["dims"])
    if len(counts) != len(at.index):
        raise NotUnderstood
    new = len(at.index) - len(source)
    return tuple(map(_repeated, at.index[new:], counts[new:], source))


def _repeated(at: sympy.Expr, count: Any, size: Any) -> sympy.Expr:
    if is_one(size):
        return ZERO
    if not isinstance(count, int) or count != 1:
        raise NotUnderstood
    return at


def _view(index: Callable[[At], Index]) -> Rule:
    return lambda at: at.value(at.args["self"], index(at))


def _getitem(at: At) -> Value:
    """One of several results."""
    made, which = at.node.args
    if not isinstance(made, Node) or not isinstance(which, int) or operation(made) not in LISTS:
        raise NotUnderstood
    return LISTS[operation(made)](at, made, which)


def _meshgrid(at: At, made: Node, which: int) -> Value:
    held = arguments(made)
    crossed = held.get("indexing") == "xy" and which < 2
    dim = 1 - which if crossed else which
    if len(shape_of(held["tensors"][which])) != 1:
        raise NotUnderstood
    return at.value(held["tensors"][which], (at.index[dim],))


def _unbind(at: At, made: Node, which: int) -> Value:
    held = arguments(made)
    dim = _dim(held["dim"], len(at.index) + 1)
    return at.value(held["self"], (*at.index[:dim], sympy.Integer(which), *at.index[dim:]))


def _split(at: At, made: Node, which: int) -> Value:
    held = arguments(made)
    dim = _dim(held["dim"], len(at.index))
    before = [integer.shape[dim] for integer in made.meta["val"][:which]]
    start = sum((at.integer(size) for size in before), start=ZERO)
    return at.value(held["self"], _moved(at.index, dim, start + at.index[dim]))


def _cat(at: At) -> Value:
    tensors = at.args["tensors"]
    dim = _dim(at.args.get("dim", at.args.get("axis", 0)), len(at.index))
    return piecewise(at, list(tensors), dim, at.index)


def _hstack(at: At) -> Value:
    """Side by side: along the second dimension, of what has one."""
    return piecewise(at, list(at.args["tensors"]), min(1, len(at.index) - 1), at.index)


def piecewise(at: At, pieces: list[Node], dim: int, index: Index) -> Value:
    """The element of tensors laid one after the other along `dim`."""
    first, *rest = pieces
    if len(shape_of(first)) != len(index):
        raise NotUnderstood
    size = at.size(first, dim)
    inside = at.logic.at_most_zero(index[dim] - size + 1)
    here = at.value(first, _moved(index, dim, ZERO) if is_one(size) else index)
    if not rest:
        return here
    beyond = piecewise(at, rest, dim, _moved(index, dim, index[dim] - size))
    return choose(at, inside, here, beyond)


def choose(at: At, condition: Formula, then: Value, other: Value) -> Value:
    """`then` where the condition holds, else `other`."""
    if isinstance(then, Formula) and isinstance(other, Formula):
        return at.logic.either(condition, then, other)
    return at.logic.select(condition, as_numbers(at.logic, then), as_numbers(at.logic, other))


def _pad(at: At) -> Value:
    if at.args.get("mode", "constant") != "constant":
        raise NotUnderstood
    source = at.args["self"]
    index, conditions = at.index, []
    for nth, left in enumerate(at.args["pad"][::2]):
        dim = len(index) - 1 - nth
        moved = index[dim] - at.integer(left)
        conditions += [at.logic.at_most_zero(-moved), at.logic.at_most_zero(moved - at.size(source, dim) + 1)]
        index = _moved(index, dim, moved)
    filled: Value = at.numbers(0 if at.args["value"] is None else at.args["value"])
    return choose(at, at.logic.conj(conditions), at.value(source, index), filled)


def _slice_scatter(at: At) -> Value:
    """The tensor, but for a slice that comes from another one."""
    dim = _dim(at.args["dim"], len(at.index))
    start = start_of(at.args["start"], at.size(_source(at), dim))
    if start is None or at.args["step"] != 1:
        raise NotUnderstood
    moved = at.index[dim] - start
    size = at.size(at.args["src"], dim)
    inside = at.logic.conj([at.logic.at_most_zero(-moved), at.logic.at_most_zero(moved - size + 1)])
    return choose(at, inside, at.value(at.args["src"], _moved(at.index, dim, moved)), at.value(_source(at)))


def _select_scatter(at: At) -> Value:
    dim = _dim(at.args["dim"], len(at.index))
    chosen = start_of(at.args["index"], at.size(_source(at), dim))
    if chosen is None:
        raise NotUnderstood
    inside = at.logic.equal(at.index[dim], chosen)
    written = at.value(at.args["src"], at.index[:dim] + at.index[dim + 1 :])
    return choose(at, inside, written, at.value(_source(at)))


def _index(at: At) -> Value:
    """source[indices]: each index tensor is itself a function of positions; all of them stand side by side."""
    source, given = at.args["self"], list(at.args["indices"])
    given += [None] * (len(shape_of(source)) - len(given))
    places = [k for k, tensor in enumerate(given) if tensor is not None]
    if places != list(range(places[0], places[-1] + 1)):
        raise NotUnderstood
    rank = len(at.index) - given.count(None)
    shape = at.shape[places[0] : places[0] + rank]
    chosen = at.index[places[0] : places[0] + rank]
    found = [
        _position(at, given[k], broadcast(chosen, shape, shape_of(given[k])), at.size(source, k))
        for k in places
    ]
    return at.value(source, (*at.index[: places[0]], *found, *at.index[places[0] + rank :]))


def _index_select(at: At) -> Value:
    source = at.args["self"]
    dim = _dim(at.args["dim"], len(at.index))
    at_dim = _position(at, at.args["index"], (at.index[dim],), at.size(source, dim))
    return at.value(source, _moved(at.index, dim, at_dim))


def _position(at: At, tensor: Node, index: Index, size: sympy.Expr) -> sympy.Expr:
    """An element of an index tensor, counted from the front."""
    if tensor.meta["val"].dtype.itemsize == 1:  # booleans select, they do not index
        raise NotUnderstood
    cases: Cases = at.numbers(tensor, index)
    (found, *others) = cases
    if others or not isinstance(found, sympy.Expr):
        raise NotUnderstood
    if at.logic.bounds.lower(found) >= 0:
        return found
    if at.logic.bounds.upper(found) < 0:
        return found + size
    raise NotUnderstood


LISTS: Mapping[str, Callable[[At, Node, int], Value]] = MappingProxyType(
    {"meshgrid": _meshgrid, "unbind": _unbind, "split": _split, "chunk": _split, "split_with_sizes": _split}
)

#: Operations that hand every element on.
UNCHANGED = (
    "alias", "clone", "contiguous", "detach", "lift", "lift_fresh", "lift_fresh_copy", "resolve_conj", "resolve_neg",
    "to", "_to_copy", "type_as", "requires_grad",
)  # fmt: skip

VIEWS: Mapping[object, Rule] = MappingProxyType(
    {
        **{name: _view(_same) for name in UNCHANGED},
        **{name: _view(_broadcast) for name in ("expand", "expand_as", "broadcast_to")},
        **{name: _view(_transpose) for name in ("transpose", "swapaxes", "swapdims")},
        **{
            name: _view(_reshape)
            for name in ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as")
        },
        **{name: _view(_reshape) for name in ("reshape_as", "squeeze", "ravel", "_reshape_alias")},
        **{name: _view(_repeat) for name in ("repeat", "tile")},
        **{name: _view(lambda at: at.index[::-1]) for name in ("t", "numpy_T")},
        **{name: _view(lambda at: _swap(at, -1, -2)) for name in ("mT", "adjoint")},
        "unsqueeze": _view(_unsqueeze),
        "permute": _view(_permute),
        **dict.fromkeys(("slice", "narrow"), _view(_slice)),
        "select": _view(_select),
        "flip": _view(_flip),
        "slice_scatter": _slice_scatter,
        "select_scatter": _select_scatter,
        **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
        "hstack": _hstack,
        "pad": _pad,
        "constant_pad_nd": _pad,
        "index": _index,
        "index_select": _index_select,
        operator.getitem: _getitem,
    }
)
