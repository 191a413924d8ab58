"""What multiplies the scores, or replaces some of them, told as what multiplies queries and keys."""

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

import torch
from torch.fx import Node

from attnopt.passes.layout import CASTS, Space, broadcast_up, input_node
from attnopt.passes.linear_finite import check_finite
from attnopt.passes.mask_writes import arguments, operation
from attnopt.passes.site import Operand, Roles
from attnopt.passes.sizes import seen_float, shape_of
from attnopt.passes.terms import NEGLIGIBLE, Fill, Term, held_as
from attnopt.rule import Reject

aten = torch.ops.aten

Times = tuple[Operand, ...]


def on_operands(space: Space, roles: Roles, factors: Sequence[Term]) -> tuple[Times, Times]:
    """Factors of the scores, as factors of the queries and of the keys. Raises Reject for one that is of neither."""
    queries: list[Operand] = []
    keys: list[Operand] = []
    for factor in factors:
        check_moderate(factor)
        for part in _parts(space, roles, factor):
            operand = Operand(part.node, space.resolve(part.dims), part.factor, inverse=part.inverse)
            (keys if _along(space, part) & set(roles.key) else queries).append(operand)
    check_finite((*queries, *keys), "scores")
    return tuple(queries), tuple(keys)


def check_moderate(factor: Term) -> None:
    """Raises Reject where numbers that would hide a key are multiplied onto the scores instead of added.

    Such products overflow, or differ by more than a softmax can bear, as soon as they are rounded in another order.
    """
    for number in numbers_written(factor.node):
        if not abs(number) < -NEGLIGIBLE:
            reason = (
                f"the scores are multiplied by a tensor made of {number:g}, whose product with them overflows or is "
                "all rounding; add a mask to the scores, or fill them"
            )
            raise Reject(reason, factor.node)


#: Operations through which a number that is written down reaches a tensor as it is.
_ELEMENTWISE = frozenset(
    {
        "mul", "div", "add", "sub", "rsub", "neg", "where", "masked_fill", "to", "_to_copy", "unsqueeze", "squeeze",
        "expand", "view", "reshape", "slice", "select", "permute", "transpose", "mT", "clone", "contiguous", "full",
        "full_like", "new_full", "fill", "clamp", "maximum", "minimum", "scalar_tensor", "lift_fresh_copy", "roll",
        "flip", "repeat", "tile", "cat", "concat", "stack", "index", "index_select", "gather", "movedim", "swapaxes",
        "t", "mH", "numpy_T", "tril", "triu", "pad", "constant_pad_nd", "flatten", "unflatten", "detach", "alias",
        "type_as", "expand_as", "view_as", "reshape_as", "narrow", "unfold", "diagonal", "repeat_interleave", "rot90",
        "index_fill", "index_put", "scatter", "masked_scatter", "copy", "slice_scatter", "select_scatter", "split",
        "chunk", "unbind", "as_strided", "amax", "amin", "max", "min", "sum", "cumsum", "abs", "relu", "multiply",
        "divide", "true_divide", "subtract", "negative", "addcmul", "lerp", "clamp_min", "clamp_max", "_unsafe_view",
    }
)  # fmt: skip


def numbers_written(node: Node) -> Iterator[float]:
    """The numbers that stand in the operations by which a tensor is made, one element from one element."""
    seen, pending = {node}, [node]
    while pending:
        here = pending.pop()
        if operation(here) not in _ELEMENTWISE:
            continue
        yield from numbers_at(here)
        above = [n for n in here.all_input_nodes if n not in seen]
        seen.update(above)
        pending.extend(above)


def numbers_at(node: Node) -> list[float]:
    """The numbers that an operation computes with."""
    call = arguments(node)
    return [n for name in _VALUES if (n := _number_in(call.get(name))) is not None]


def _number_in(argument: Any) -> float | None:
    """A number, or the one that a symbolic float is now; attnopt.passes.settle fixes what a bias is made of."""
    made = argument.meta.get("val") if isinstance(argument, Node) else argument
    if isinstance(made, torch.SymFloat):
        return seen_float(made)
    return float(made) if isinstance(made, int | float) else None


#: Arguments that are numbers to compute with; others are sizes and places.
_VALUES = ("self", "other", "value", "fill_value", "alpha", "min", "max", "s")


def on_values(space: Space, roles: Roles, factors: Sequence[Term]) -> Times:
    """Factors of the weights that vary along the keys alone, as factors of the values. Raises Reject for another."""
    for factor in factors:
        if not is_by_key(space, roles, factor):
            reason = "the weights are multiplied by a tensor along the keys that is not made of a mask"
            raise Reject(reason, factor.at or factor.node)
    return tuple(Operand(f.node, space.resolve(f.dims), inverse=f.inverse) for f in factors)


def is_by_key(space: Space, roles: Roles, part: Term | Fill) -> bool:
    """Whether a tensor varies along nothing but the keys and what they have in common with the values."""
    held = {axis for axes in space.resolve(part.dims) for axis in axes}
    return held <= {*roles.batch, *roles.kv_heads, *roles.key}


def _along(space: Space, term: Term) -> set[object]:
    return {axis for axes in space.resolve(term.dims) for axis in axes}


def _parts(space: Space, roles: Roles, term: Term) -> list[Term]:
    """The factor, if it varies along queries alone, or along keys alone; else the two that it is a product of."""
    held = _along(space, term)
    if held <= {*roles.batch, *roles.heads, *roles.query} or held <= {
        *roles.batch,
        *roles.kv_heads,
        *roles.key,
    }:
        return [term]
    sides = term.node.args[:2] if term.node.target == aten.mul.Tensor else ()
    if len(sides) == 2 and all(isinstance(side, Node) for side in sides):
        halves = [_half(term, side) for side in sides]  # type: ignore[arg-type]
        if all(_along(space, half) < held for half in halves):
            return [part for half in halves for part in _parts(space, roles, half)]
    raise Reject(
        "the scores are multiplied by a tensor that varies along the keys, and not along them alone; if it is a mask "
        "of 0 and 1, fill them where it is 0: scores.masked_fill(mask == 0, -torch.inf)",
        term.node,
    )


def _half(term: Term, side: Node) -> Term:
    return Term(side, broadcast_up(term.dims, shape_of(side)), inverse=term.inverse)


def faint(
    space: Space, roles: Roles, fill: Fill, others: Sequence[Fill | Term]
) -> tuple[Operand, Operand] | None:
    """A fill that weighs, under a mask of keys, as a bias and a factor of the keys; None where it cannot be told so.

    The score of a key that is all zeros is 0, whatever the query: with the number added it is the number. The bias is
    to be taken relative to its row, where no sink stands beside it.
    """
    value = held_as(fill.value, fill.casts)
    dims = space.resolve(fill.dims)
    alone = {axis for axes in dims for axis in axes} <= {*roles.batch, *roles.kv_heads, *roles.key}
    at = fill.at
    first = at is not None and all(other.at is not None and at < other.at for other in others)
    if not (alone and first and isfinite(value)):
        return None
    node = _uncast(fill.node)
    bias = Operand(node, dims, value, dtype=torch.float32, negated=not fill.hides)
    return bias, Operand(node, dims, negated=fill.hides, function="keep")


def _uncast(condition: Node) -> Node:
    """A condition as it was before it became a number."""
    while condition.target in CASTS and condition.meta["val"].dtype != torch.bool:
        condition = input_node(condition)
    return condition
