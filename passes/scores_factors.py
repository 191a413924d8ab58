"""What multiplies the scores, or replaces some of them, told as what multiplies queries and keys."""

from collections.abc import Sequence
from math import isfinite

import torch
from torch.fx import Node

from attnopt.passes.layout import Space, broadcast_up
from attnopt.passes.site import Operand, Roles
from attnopt.passes.sizes import shape_of
from attnopt.passes.terms import Fill, Term, held_as
from attnopt.rule import Reject

aten = torch.ops.aten

Times = tuple[Operand, ...]


def on_operands(space: Space, roles: Roles, factors: Sequence[Term]) -> tuple[Times, Times]:
    """Factors of the scores, as factors of the queries and of the keys. Raises Reject for one that is of neither."""
    queries: list[Operand] = []
    keys: list[Operand] = []
    for factor in factors:
        for part in _parts(space, roles, factor):
            operand = Operand(part.node, space.resolve(part.dims), part.factor, inverse=part.inverse)
            (keys if _along(space, part) & set(roles.key) else queries).append(operand)
    return tuple(queries), tuple(keys)


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
        "the scores are multiplied by a tensor that varies along the keys, and not along them alone",
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
    bias = Operand(fill.node, dims, value, dtype=torch.float32, negated=not fill.hides)
    return bias, Operand(fill.node, dims, negated=fill.hides, function="keep")
