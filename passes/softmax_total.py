"""What exponentials are divided by: their own sum, to which exp(sink) may be added."""

from math import log
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.constants import present
from attnopt.passes.layout import Axes, Dims, Space, broadcast_up, input_node
from attnopt.passes.sizes import shape_of
from attnopt.passes.softmax_form import (
    Exponential,
    Row,
    Sink,
    above_casts,
    is_called,
    number,
    reduction_of,
    row_of,
)
from attnopt.passes.terms import Term
from attnopt.rule import Reject

aten = torch.ops.aten


def read_total(space: Space, divisor: object, dims: Dims, away: Axes, exp: Exponential) -> Sink | None:
    """The sink in a divisor that is broadcast onto a tensor labelled `dims`, along `away`; Reject if it is no sum.

    exp: whose sum it has to be.
    """
    row = row_of(space, divisor, dims, away) if isinstance(divisor, Node) else None
    if row is None:
        raise Reject("exp is divided by something other than its sum", exp.node, -1)
    return _total(space, row, exp)


def _total(space: Space, row: Row, exp: Exponential) -> Sink | None:
    node = row.node
    found = reduction_of(space, row, exp.dims, exp.key)
    if found is not None and found.name == "sum" and above_casts(found.source) is above_casts(exp.node):
        return None
    if is_called(node) and node.target in (aten.add.Tensor, aten.add.Scalar) and not node.kwargs:
        return _plus(space, row, exp)
    if is_called(node) and node.target in (aten.clamp_min.default, aten.clamp.default):
        return _bounded(space, row, exp)
    raise Reject(f"exp is divided by something other than its sum ({node.name})", node, 2)


def _plus(space: Space, row: Row, exp: Exponential) -> Sink | None:
    left, right = row.node.args[:2]
    reasons = []
    for total, extra in ((left, right), (right, left)):
        part = row_of(space, total, row.dims, ()) if isinstance(total, Node) else None
        if part is None:
            continue
        try:
            inner = _total(space, part, exp)
        except Reject as reject:
            reasons.append(reject)
            continue
        if inner is not None:
            raise Reject("the sum of exponentials has several sinks", row.node, 3)
        return _extra(space, extra, row, exp)
    raise max(reasons, key=lambda r: r.depth)


def _extra(space: Space, extra: object, row: Row, exp: Exponential) -> Sink | None:
    """exp(sink - shift), or a number, that is added to the sum."""
    held = number(extra)
    if held is not None:
        return _number(held, row, exp)
    added = row_of(space, extra, row.dims, ()) if isinstance(extra, Node) else None
    if added is None or not is_called(added.node) or added.node.target != aten.exp.default:
        raise Reject(f"{extra} is added to the sum of exponentials", row.node, 3)
    return _power(space, _source(space, added), exp)


def _source(space: Space, row: Row) -> Row:
    """What a row is computed from, element by element."""
    source = input_node(row.node)
    return row_of(space, source, row.dims, ()) or Row(source, row.dims)


def _number(held: float, row: Row, exp: Exponential) -> Sink | None:
    if held == 0:
        return None
    if exp.shift is not None:
        raise Reject(
            f"{held:g} is added to the sum of exponentials, from whose logits the maximum is subtracted: "
            "the sum would not be what a softmax divides by",
            row.node,
            3,
        )
    if held < 0:
        raise Reject(f"{-held:g} is subtracted from the sum of exponentials", row.node, 3)
    return Sink(None, log(held))


def _power(space: Space, power: Row, exp: Exponential) -> Sink:
    """The sink of exp(power): what is left when the shift is added to it."""
    if exp.shift is None:
        return Sink(Term(power.node, power.dims))
    node = power.node
    if is_called(node) and node.target == aten.neg.default and _source(space, power) == exp.shift:
        return Sink(None, 0.0)
    if is_called(node) and node.target in (aten.sub.Tensor, aten.rsub.Scalar) and not node.kwargs:
        order = (0, 1) if node.target == aten.sub.Tensor else (1, 0)
        sink, taken = (node.args[n] for n in order)
        shift = row_of(space, taken, power.dims, ()) if isinstance(taken, Node) else None
        if shift == exp.shift:
            return _sink(sink, power)
    raise Reject("what is added to the sum of exponentials is not exp of a sink minus the maximum", node, 3)


def _sink(sink: object, power: Row) -> Sink:
    value = present(sink)
    if value is not None:
        return Sink(None, value)
    held = cast(Node, sink)
    if not isinstance(held.meta["val"], Tensor):
        raise Reject("a sink that sizes make is not understood", power.node, 3)
    return Sink(Term(held, broadcast_up(power.dims, shape_of(held))))


def _bounded(space: Space, row: Row, exp: Exponential) -> Sink | None:
    """A sum that is at least 1, since the largest logit is 0, is not changed by a bound below that."""
    least = present(row.node.args[1]) if len(row.node.args) > 1 else None
    upper = row.node.args[2] if len(row.node.args) > 2 else row.node.kwargs.get("max")
    if not exp.owns_maximum or least is None or least > 1 or upper is not None:
        raise Reject("the sum of exponentials is clamped where that may change it", row.node, 3)
    return _total(space, _source(space, row), exp)
