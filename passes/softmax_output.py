"""Reads what follows the product with the values and belongs to the softmax: its division, or a gate that is a sink."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.layout import Axes, Dims, Space, broadcast_up, input_node, step_down
from attnopt.passes.sizes import shape_of
from attnopt.passes.softmax_form import (
    LONGEST,
    Form,
    Row,
    Sink,
    above_casts,
    divisor_of,
    is_called,
    is_float_cast,
    reduction_of,
    row_of,
)
from attnopt.passes.softmax_nodes import between
from attnopt.passes.softmax_total import read_total
from attnopt.passes.terms import Term
from attnopt.passes.weights import Weights
from attnopt.rule import Reject
from attnopt.shadow import Shadow

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Output:
    """root: the node that holds the attention's output, labelled `dims`; path: inner nodes from the product on.

    beside: nodes from the logits to the divisor, or to the gate. value: the values, where they are only a part of what
    the weights are multiplied with.
    """

    root: Node
    dims: Dims
    path: frozenset[Node] = frozenset()
    beside: frozenset[Node] = frozenset()
    sink: Sink | None = None
    value: tuple[Node, Dims] | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """A node below the product, and its labels."""

    node: Node
    dims: Dims


def read_output(form: Form, shadow: Shadow, weights: Weights) -> Output:
    """The root of a site: the product with the values, or the division or the gate after it."""
    product = weights.form.node
    width, known = _width(form, weights), dict(form.space.parts)
    for place in _places(form.space, shadow, Place(product, weights.out_dims)):
        for user in shadow.users(place.node):
            found = _ending(form, user, place, width)
            if found is not None:
                path = (between(shadow, product, user) | {product}) - {user}
                beside = between(shadow, form.logits, user) - {user}
                return Output(user, place.dims, path, beside, found[0] or form.sink)
    # What views on the way to nothing have split, the pixels into rows and columns, is one axis of queries.
    form.space.parts = known
    if form.undivided is not None:
        raise Reject(
            "exp is multiplied with values, but what comes out is not divided by its sum; keys that come block by "
            "block need one softmax over all of them",
            product,
            3,
        )
    return Output(product, weights.out_dims, sink=form.sink)


def _width(form: Form, weights: Weights) -> Axes:
    """The axes of the output that the weights do not have."""
    held = {a for axes in form.dims for a in form.space.leaves(axes)}
    return tuple(a for axes in weights.out_dims for a in form.space.leaves(axes) if a not in held)


def _places(space: Space, shadow: Shadow, place: Place) -> Iterator[Place]:
    """The product, and what views and casts make of it, as long as there is one way."""
    for _ in range(LONGEST):
        yield place
        users = shadow.users(place.node)
        if len(users) != 1 or place.node in shadow.results:
            return
        moved = _moved(space, users[0], place)
        if moved is None:
            return
        place = moved


def _moved(space: Space, user: Node, place: Place) -> Place | None:
    if not is_called(user) or not user.args or user.args[0] is not place.node:
        return None
    if is_float_cast(user):
        return Place(user, place.dims)
    try:
        dims = step_down(space, user, place.dims)
    except Reject:
        return None
    return None if dims is None or input_node(user) is not place.node else Place(user, dims)


def _ending(form: Form, user: Node, place: Place, width: Axes) -> tuple[Sink | None] | None:
    """The sink (or none) that a division by the sum, or a gate, holds; None if the node is neither."""
    made = user.meta.get("val")
    if not is_called(user) or not isinstance(made, Tensor) or shape_of(user) != shape_of(place.node):
        return None
    if form.undivided is not None:
        divisor = divisor_of(user, place.node)
        if divisor is None:
            return None
        return (read_total(form.space, divisor, place.dims, width, form.undivided),)
    if user.target != aten.mul.Tensor or place.node not in user.args or form.sink is not None:
        return None
    gate = user.args[1] if user.args[0] is place.node else user.args[0]
    row = row_of(form.space, gate, place.dims, width) if isinstance(gate, Node) else None
    sink = _gate(form, row) if row is not None else None
    return None if sink is None else (sink,)


def _gate(form: Form, row: Row) -> Sink | None:
    """sigmoid(logsumexp(logits) - sink): exp(sink) joins the sum of the softmax."""
    if not is_called(row.node) or row.node.target != aten.sigmoid.default:
        return None
    inside = row_of(form.space, input_node(row.node), row.dims, ())
    if inside is None or not is_called(inside.node) or inside.node.target != aten.sub.Tensor:
        return None
    total, sink = inside.node.args[:2]
    if inside.node.kwargs or not isinstance(total, Node) or not isinstance(sink, Node):
        return None
    summed = row_of(form.space, total, inside.dims, ())
    found = None if summed is None else reduction_of(form.space, summed, form.dims, form.key)
    if not found or found.name != "logsumexp" or above_casts(found.source) is not above_casts(form.logits):
        return None
    return Sink(Term(sink, broadcast_up(inside.dims, shape_of(sink))))
