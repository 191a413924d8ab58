"""The softmax as one operator, with or without columns that take part in the sum and are dropped afterwards.

A learned sink is such a column: softmax(cat([scores, sink]))[..., :-1] (arXiv 2309.17453, section 3.3). Several count
as one, the logarithm of the sum of their exponentials.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from typing import Any, cast

import torch
from torch.fx import Node

from attnopt.passes.layout import Axes, Dims, Space, dropout_rate, input_node, is_copy
from attnopt.passes.sizes import is_one, same, shape_of
from attnopt.passes.softmax_form import (
    DETACHED,
    LONGEST,
    Form,
    Sink,
    above_casts,
    fits,
    is_called,
    is_float_cast,
    number,
    reduction_of,
    row_of,
)
from attnopt.passes.softmax_nodes import between
from attnopt.passes.terms import Cast, Term
from attnopt.rule import Reject
from attnopt.shadow import Shadow

aten = torch.ops.aten


#: More columns than this are no sinks that somebody learns.
MOST_COLUMNS = 16


@dataclass(frozen=True, slots=True)
class Above:
    """The logits under casts and the subtraction of their maximum; columns: what is joined to them, first or last."""

    logits: Node
    casts: tuple[Cast, ...]
    columns: Node | float | None = None
    count: int = 1
    first: bool = False


def read_softmax(anchor: Node, shadow: Shadow) -> Form:
    """The form of a softmax node. Raises Reject."""
    space = Space()
    full = tuple(space.fresh(size) for size in shape_of(anchor))
    place = int(anchor.args[1]) % max(len(full), 1)  # type: ignore[arg-type]
    if not full:
        raise Reject("a softmax of a single number", anchor)
    casts = (Cast(anchor.meta["val"].dtype, 1.0),)  # softmax(x, dim, dtype) casts x first
    above = _above(space, Above(input_node(anchor), casts), full, place)
    safe = anchor.target is aten._safe_softmax.default
    split = list(_split(above, place))
    if not split:
        inner = between(shadow, above.logits, anchor)
        return Form(space, anchor, above.logits, full, full[place], inner, above.casts, safe=safe)
    reasons: list[Reject] = []
    for part in split:
        try:
            return _beside(space, shadow, anchor, place, part)
        except Reject as reject:
            reasons.append(reject)
    raise max(reasons, key=lambda reject: reject.depth)


def _beside(space: Space, shadow: Shadow, anchor: Node, place: int, above: Above) -> Form:
    """The form of a softmax over logits and columns, of which the columns are dropped."""
    start, first = _dropped(shadow, anchor, place, above.count)
    if first != above.first:
        raise Reject("another column is dropped from the softmax than was joined to the scores", start, 2)
    dims = tuple(space.fresh(size) for size in shape_of(start))
    inner = between(shadow, above.logits, start)
    form = Form(space, start, above.logits, dims, dims[place], inner, above.casts)
    return replace(form, sink=_sink(space, above, dims, place))


def _above(space: Space, here: Above, dims: Dims, place: int) -> Above:
    """Upwards through casts and the subtraction of the row's maximum, to the logits, or to their concatenation."""
    for _ in range(LONGEST):
        node = here.logits
        if is_float_cast(node) and not is_copy(node):
            here = replace(
                here, logits=input_node(node), casts=(*here.casts, Cast(node.meta["val"].dtype, 1.0))
            )
        elif is_called(node) and is_copy(node):
            here = replace(here, logits=input_node(node))
        elif (unshifted := without_maximum(space, node, dims, dims[place])) is not None:
            here = replace(here, logits=unshifted)
        else:
            break
    return here


def without_maximum(space: Space, node: Node, dims: Dims, key: Axes) -> Node | None:
    """x, for a node x - max(x) with the maximum over the keys: the softmax does not notice the difference."""
    if not is_called(node) or node.target != aten.sub.Tensor or node.kwargs.get("alpha", 1) != 1:
        return None
    scores, shift = node.args[:2]
    if not isinstance(scores, Node) or not isinstance(shift, Node) or shift is scores:
        return None
    row = row_of(space, shift, dims, key, DETACHED)
    found = None if row is None else reduction_of(space, row, dims, key)
    if not found or found.name != "amax" or above_casts(found.source) is not above_casts(scores):
        return None
    return scores


def _split(here: Above, place: int) -> Iterator[Above]:
    """The ways to part the logits and the columns that are joined to them; none where nothing is joined."""
    node = here.logits
    rank = len(shape_of(node))
    if node.op != "call_function":
        return
    if node.target in (aten.pad.default, aten.constant_pad_nd.default):
        yield _padded(here, place, rank)
    elif node.target == aten.cat.default:
        yield from _concatenated(here, place, rank)


def _concatenated(here: Above, place: int, rank: int) -> Iterator[Above]:
    node = here.logits
    parts, dim = cast(Sequence[Node], node.args[0]), int(cast(int, node.args[1])) if len(node.args) > 1 else 0
    if dim % rank != place or len(parts) != 2:
        raise Reject("scores are concatenated from several parts", node, 1)
    left, right = parts
    found = False
    for logits, columns, first in ((left, right, False), (right, left, True)):
        count = shape_of(columns)[place]
        if isinstance(count, int) and count <= MOST_COLUMNS:
            found = True
            yield replace(here, logits=logits, columns=columns, count=count, first=first)
    if not found:
        raise Reject(f"more than {MOST_COLUMNS} columns are joined to the scores", node, 1)


def _padded(here: Above, place: int, rank: int) -> Above:
    node = here.logits
    pads = list(node.args[1])  # type: ignore[arg-type]
    mode = node.args[2] if node.target == aten.pad.default and len(node.args) > 2 else "constant"
    value = node.args[-1] if len(node.args) > (3 if node.target == aten.pad.default else 2) else 0.0
    value = 0.0 if value is None else value
    before, behind = pads[:2]
    one_side = all(isinstance(n, int) for n in pads) and min(before, behind) == 0 < max(before, behind)
    if place != rank - 1 or not one_side or any(pads[2:]) or mode != "constant":
        raise Reject("scores are padded otherwise than by columns on one side", node, 1)
    count = max(before, behind)
    return replace(here, logits=input_node(node), columns=float(value), count=count, first=before > 0)  # type: ignore[arg-type]


def _dropped(shadow: Shadow, anchor: Node, place: int, count: int) -> tuple[Node, bool]:
    """The slice that drops the first or the last columns of the weights, and whether it is the first."""
    node = anchor
    for _ in range(LONGEST):
        users = shadow.users(node)
        for user in users:
            if (first := drops(user, node, place, count)) is not None:
                return user, first
        passed = [u for u in users if u.args and u.args[0] is node and _keeps(u)]
        if len(passed) != 1:
            break
        node = passed[0]
    raise Reject("a column is joined to the scores, and stays in the weights", anchor, 2)


def _keeps(node: Node) -> bool:
    dropout = node.target == aten.dropout.default and dropout_rate(node) == 0
    return is_float_cast(node) or is_copy(node) or dropout


def drops(user: Node, node: Node, place: int, count: int = 1) -> bool | None:
    """Whether a slice or narrow drops the first columns (True), the last (False), or is something else (None)."""
    if user.target not in (aten.slice.Tensor, aten.narrow.default) or user.args[0] is not node:
        return None
    dim, start, *rest = cast(Sequence[Any], (*user.args[1:], *_SLICE_DEFAULTS[len(user.args) - 1 :]))
    before, after = shape_of(node), shape_of(user)
    whole = all(same(a, b) for n, (a, b) in enumerate(zip(before, after, strict=True)) if n != place)
    step_is_one = user.target == aten.narrow.default or rest[1] == 1
    if int(dim) % len(before) != place or not whole or not step_is_one:
        return None
    if not fits(before[place], after[place], count) or start not in (0, count, None):
        return None
    return bool(start == count)


_SLICE_DEFAULTS = (0, None, None, 1)


def _sink(space: Space, above: Above, dims: Dims, place: int) -> Sink:
    value = number(above.columns)
    if value is not None:
        return Sink(None, value + log(above.count))
    node, several = cast(Node, above.columns), space.fresh(above.count)
    labels = tuple(
        several if n == place else () if is_one(size) else axes
        for n, (size, axes) in enumerate(zip(shape_of(node), dims, strict=True))
    )
    return Sink(Term(node, labels, casts=above.casts), several=several)
