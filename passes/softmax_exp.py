"""Reads softmax attention whose softmax is written out: exp and sum, exp of log_softmax, exp of x - logsumexp(x).

The sum may be divided by before the values are met or after, the maximum may be subtracted or not (which is the same in
exact arithmetic; without it, eager overflows where the kernel does not), and exp(sink) may be added to the sum.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.layout import Axes, Dims, Space, broadcast_up, input_node, is_copy
from attnopt.passes.sizes import is_one, same, shape_of
from attnopt.passes.softmax import site_around
from attnopt.passes.softmax_form import (
    DETACHED,
    Exponential,
    Form,
    above_casts,
    divisor_of,
    is_called,
    is_float_cast,
    number,
    onto,
    reduction_of,
    reduction_places,
    row_of,
    truth_of,
)
from attnopt.passes.softmax_nodes import between
from attnopt.passes.softmax_ones import summed_by_ones
from attnopt.passes.softmax_total import read_total
from attnopt.passes.terms import Cast, Fill
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow

aten = torch.ops.aten

#: Operations between exp and the sum or the product: more are no softmax.
LONGEST = 8


class ExpRule:
    """Softmax attention whose softmax is written out with exp."""

    name = "softmax by hand"
    anchors = frozenset({aten.exp.default, aten.exp_.default})

    def read(self, anchor: Node, shadow: Shadow) -> Site:
        """The site around one exp. Raises Reject, with depth -1 where nothing looks like a softmax."""
        form = read_exp(anchor, shadow)
        site = site_around(self.name, form, shadow)
        if form.unshifted:
            below = {n for n in site.interior if shadow.order[n] > shadow.order[anchor]}
            _need_range(form.inner | (below if form.undivided is not None else set()))
        return site


def _need_range(nodes: Iterable[Node]) -> None:
    """Raises Reject where exp or its sum, which no maximum keeps small, is cast to a type that ends much earlier."""
    for node in filter(is_float_cast, nodes):
        made, before = node.meta["val"].dtype, input_node(node).meta["val"].dtype
        if before.is_floating_point and 2 * torch.finfo(made).max < torch.finfo(before).max:
            raise Reject(
                f"exp of the scores, with no maximum subtracted, is cast to {made} before it is divided by its sum; "
                f"that overflows above {torch.finfo(made).max:.3g}: subtract each row's largest score, or cast later",
                node,
                3,
            )


def read_exp(anchor: Node, shadow: Shadow) -> Form:
    """The form of a softmax around its exp."""
    power = above_casts(input_node(anchor))
    if not shape_of(anchor):
        raise Reject("exp of a single number", anchor, -1)
    if is_called(power) and power.target in (aten.log_softmax.int, aten._log_softmax.default):
        return _of_log_softmax(anchor, power, shadow)
    normalised = _of_logsumexp(anchor, power, shadow)
    return normalised or _of_sum(anchor, power, shadow)


def _casts(*nodes: Node) -> tuple[Cast, ...]:
    return tuple(Cast(node.meta["val"].dtype, 1.0) for node in nodes)


def _labels(node: Node) -> tuple[Space, Dims]:
    space = Space()
    return space, tuple(space.fresh(size) for size in shape_of(node))


def _of_log_softmax(anchor: Node, node: Node, shadow: Shadow) -> Form:
    space, dims = _labels(anchor)
    key = dims[int(node.args[1])]  # type: ignore[arg-type]
    logits = input_node(node)
    return Form(space, anchor, logits, dims, key, between(shadow, logits, anchor), _casts(anchor, node))


def _of_logsumexp(anchor: Node, power: Node, shadow: Shadow) -> Form | None:
    """exp(x - logsumexp(x))."""
    if not is_called(power) or power.target != aten.sub.Tensor or power.kwargs:
        return None
    logits, total = power.args[:2]
    if not isinstance(logits, Node) or not isinstance(total, Node):
        return None
    space, dims = _labels(anchor)
    for key in _candidates(dims, total):
        row = row_of(space, total, dims, key)
        found = None if row is None else reduction_of(space, row, dims, key)
        if found and found.name == "logsumexp" and above_casts(found.source) is above_casts(logits):
            inner = between(shadow, above_casts(logits), anchor)
            return Form(space, anchor, above_casts(logits), dims, key, inner, _casts(anchor, power))
    return None


def _candidates(dims: Dims, row: Node) -> Iterator[Axes]:
    """The dimensions along which a tensor may be broadcast; in the end that of a single key, which has no axis."""
    aligned = broadcast_up(dims, shape_of(row))
    missing = (*(((),) * (len(dims) - len(aligned))), *aligned)
    yield from (axes for axes, held in zip(dims, missing, strict=True) if axes and not held)
    if () in dims:
        yield ()


@dataclass(frozen=True, slots=True)
class Numerator:
    """exp, masked: the node that is summed, over which dimension, and the masks."""

    node: Node
    place: int
    fills: tuple[tuple[Node, bool], ...]


def _of_sum(anchor: Node, power: Node, shadow: Shadow) -> Form:
    """exp(x - shift) / its sum, before or after the product with the values."""
    numerator = _numerator(anchor, shadow)
    space, dims = _labels(anchor)
    key = dims[numerator.place]
    logits, exp = _unshifted(space, power, Exponential(numerator.node, dims, key))
    fills = tuple(_fill(space, dims, *mask) for mask in numerator.fills)
    casts = _casts(anchor, power)
    inner = between(shadow, logits, numerator.node) | _sums(shadow, numerator)
    form = Form(space, numerator.node, logits, dims, key, inner, casts, fills=fills, undivided=exp)
    form = replace(form, sharp=not exp.owns_maximum or bool(fills), unshifted=exp.shift is None)
    return _divided(shadow, form, exp) or form


def _fill(space: Space, dims: Dims, mask: Node, hides: bool) -> Fill:  # noqa: FBT001 - which way the mask reads
    truth = truth_of(space, mask, broadcast_up(dims, shape_of(mask)))
    if truth is None:
        raise Reject("exp is multiplied by a tensor that is not made of a mask", mask, 1)
    return Fill(*truth, -torch.inf, hides)


def _numerator(anchor: Node, shadow: Shadow) -> Numerator:
    """From exp down, through masks and casts, to the tensor that is summed."""
    node: Node = anchor
    fills: tuple[tuple[Node, bool], ...] = ()
    for _ in range(LONGEST):
        users = shadow.users(node)
        for user in users:
            found = reduction_places(user)
            if found is not None and found[0] == "sum" and found[1] is node:
                return Numerator(node, found[2], fills)
            if (place := summed_by_ones(user, node)) is not None:
                return Numerator(node, place, fills)
        passed = [(user, mask) for user in users if (mask := _masks(user, node)) is not None]
        if len(passed) != 1:
            break
        node, fills = passed[0][0], (*fills, *passed[0][1])
    raise Reject("exp is not summed", anchor, -1)


def _masks(user: Node, node: Node) -> tuple[tuple[Node, bool], ...] | None:
    """The mask, and whether it hides, that a node multiplies or fills; () for a cast; None for something else."""
    if not is_called(user) or not user.args or not _same_shape(user, node):
        return None
    if user.args[0] is node and (is_float_cast(user) or is_copy(user)):
        return ()
    match onto(user, node):
        case aten.mul.Tensor:
            other = user.args[1] if user.args[0] is node else user.args[0]
            return ((cast(Node, other), False),) if _is_tensor(other) and other is not node else None
        case aten.masked_fill.Scalar | aten.masked_fill.Tensor:
            condition = user.args[1]
            fits = user.args[0] is node and number(user.args[2]) == 0
            return ((condition, True),) if fits else None  # type: ignore[return-value]
        case aten.where.self | aten.where.ScalarOther | aten.where.ScalarSelf:
            condition, then, other = user.args
            if then is node and number(other) == 0:
                return ((condition, False),)  # type: ignore[return-value]
            if other is node and number(then) == 0:
                return ((condition, True),)  # type: ignore[return-value]
    return None


def _is_tensor(value: object) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


def _same_shape(a: Node, b: Node) -> bool:
    if not isinstance(a.meta.get("val"), Tensor):
        return False
    one, other = shape_of(a), shape_of(b)
    return len(one) == len(other) and all(same(x, y) for x, y in zip(one, other, strict=True))


def _unshifted(space: Space, power: Node, exp: Exponential) -> tuple[Node, Exponential]:
    """x, for exp(x - shift) with a shift that does not vary along the keys; x itself for exp(x)."""
    if not is_called(power) or power.target != aten.sub.Tensor or power.kwargs:
        return power, exp
    logits, shift = power.args[:2]
    if not isinstance(logits, Node) or not isinstance(shift, Node):
        return power, exp
    if len(shape_of(logits)) != len(exp.dims) or not _broadcasts_only(logits, power):
        return power, exp
    row = row_of(space, shift, exp.dims, exp.key)
    if row is None:
        return power, exp
    freed = row_of(space, shift, exp.dims, exp.key, DETACHED)
    found = None if freed is None else reduction_of(space, freed, exp.dims, exp.key)
    owns = found is not None and found.name == "amax" and above_casts(found.source) is above_casts(logits)
    return above_casts(logits), replace(exp, shift=row, owns_maximum=owns)


def _broadcasts_only(logits: Node, power: Node) -> bool:
    return all(same(a, b) or is_one(a) for a, b in zip(shape_of(logits), shape_of(power), strict=True))


def _sums(shadow: Shadow, numerator: Numerator) -> frozenset[Node]:
    return frozenset(u for u in shadow.users(numerator.node) if reduction_places(u) is not None)


def _divided(shadow: Shadow, form: Form, exp: Exponential) -> Form | None:
    """The form whose weights are divided by their sum before they meet the values; None if they are not."""
    nodes = [exp.node, *(u for u in shadow.users(exp.node) if is_float_cast(u))]
    for node in nodes:
        for user in shadow.users(node):
            divisor = divisor_of(user, node)
            if divisor is None:
                continue
            sink = read_total(form.space, divisor, form.dims, form.key, exp)
            inner = form.inner | between(shadow, exp.node, user)
            return replace(form, start=user, undivided=None, sink=sink, inner=inner)
    return None


RULE = ExpRule()
