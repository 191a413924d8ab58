"""How far each query of a stream is beyond the last place, as nodes of the shadow: in the text, or of what counts."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch.fx import Node

from attnopt.mask import First, KeyPadding, Mask, Opaque
from attnopt.passes import emit
from attnopt.passes.rope_moved import Along, Beyond, Growth, length_of
from attnopt.passes.rope_trial import bare
from attnopt.passes.site import Operand, Roles
from attnopt.rule import Reject, Site

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Stand:
    """Query i stands at the slot i + offset; `last` is the last place."""

    query: Along
    offset: Node | int
    last: int


def beyond(growth: Growth, stand: Stand) -> Beyond:
    """By the number of keys before each query."""
    index = _numbers(growth, stand)
    if isinstance(stand.offset, int):
        start: Node | int = stand.offset - stand.last
    else:
        start = growth.call(operator.sub, stand.offset, stand.last)
    return Beyond(index, growth.call(aten.clamp.default, growth.call(aten.add.Tensor, index, start), 0))


def beyond_among_kept(growth: Growth, stand: Stand, kept: Operand, roles: Roles) -> Beyond:
    """By the number of keys that count before each query: for each sequence, if `kept` has one row for each."""
    upto = growth.call(aten.cumsum.default, _keys_last(growth, kept, roles), -1)
    index = _numbers(growth, stand)
    slots = growth.call(aten.add.Tensor, index, stand.offset)
    keys = upto.meta["val"].shape[-1]
    if isinstance(keys, int):
        most: Node | int = keys - 1
    else:
        most = growth.call(operator.sub, growth.call(aten.sym_size.int, upto, upto.meta["val"].dim() - 1), 1)
    slots = growth.call(aten.clamp.default, slots, 0, most)
    seen = growth.call(aten.index_select.default, upto, -1, slots)
    places = growth.call(aten.sub.Tensor, seen, 1 + stand.last)
    return Beyond(index, growth.call(aten.clamp.default, places, 0))


def _numbers(growth: Growth, stand: Stand) -> Node:
    """The numbers of the queries."""
    count = length_of(growth, stand.query)
    return growth.call(aten.arange.default, count, device=stand.query.node.meta["val"].device)


def joined(growth: Growth, site: Site, parts: Sequence[Mask]) -> Operand | None:
    """What several masks say of the keys of a single query, as one operand; None where one is not about keys alone."""
    roles, nodes = emit.result_of(site).roles, []
    for part in parts:
        operand = site.operands.get(part.name) if isinstance(part, KeyPadding | Opaque) else None
        if isinstance(part, First):
            k = bare(site.operands["k"])
            count = length_of(growth, Along(k.node, k.dims, roles.key))
            index = growth.call(aten.arange.default, count, device=k.node.meta["val"].device)
            nodes.append(growth.call(aten.lt.Scalar, index, part.count))
        elif isinstance(operand, Operand) and set(operand.dims) <= {roles.key, roles.batch, ()}:
            nodes.append(_keys_last(growth, operand, roles))
        else:
            return None
    made = reduce(lambda a, b: growth.call(aten.logical_and.default, a, b), nodes)
    is_apart = made.meta["val"].dim() > 1
    return Operand(made, (roles.batch, roles.key) if is_apart else (roles.key,))


def _keys_last(growth: Growth, kept: Operand, roles: Roles) -> Node:
    """(B, Sk), or (Sk,) where all sequences have the same."""
    if roles.key not in kept.dims or not set(kept.dims) <= {roles.key, roles.batch, ()}:
        raise Reject("what hides its keys has other dimensions than sequences and keys", kept.node)
    node, dims = kept.node, list(kept.dims)
    if kept.negated:
        node = growth.call(aten.logical_not.default, node)
    for dim in reversed(range(len(dims))):
        if not dims[dim]:
            node = growth.call(aten.select.int, node, dim, 0)
            del dims[dim]
    is_turned = len(dims) == 2 and dims[0] == roles.key
    return growth.call(aten.transpose.int, node, 0, 1) if is_turned else node
