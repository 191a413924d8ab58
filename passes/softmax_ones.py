"""Reads the sum of exponentials as one more column of the output: the values have a column of ones beside them."""

from collections.abc import Sequence
from typing import cast

import torch
from torch.fx import Node

from attnopt.passes.contraction import contraction, other_operand
from attnopt.passes.layout import input_node
from attnopt.passes.sizes import is_one, shape_of
from attnopt.passes.softmax_form import Form, is_called, number
from attnopt.passes.softmax_nodes import between
from attnopt.passes.softmax_output import Output
from attnopt.passes.softmax_sinks import drops
from attnopt.passes.weights import Weights
from attnopt.shadow import Shadow

aten = torch.ops.aten


def summed_by_ones(user: Node, node: Node) -> int | None:
    """The dimension of `node` that a product with (values, ones) sums over; None for another node."""
    form = contraction(user)
    if form is None or node not in (form.lhs, form.rhs) or form.lhs is form.rhs:
        return None
    if values_beside_ones(other_operand(form, node)) is None:
        return None
    letters = form.lhs_letters if form.lhs is node else form.rhs_letters
    places = [n for n, letter in enumerate(letters) if letter in form.contracted]
    return places[0] if len(places) == 1 else None


def values_beside_ones(node: Node) -> Node | None:
    """v, for a node that is v with a column of ones behind it."""
    if not is_called(node):
        return None
    if node.target == aten.pad.default and node.args[1:] == ([0, 1], "constant", 1.0):
        return input_node(node)
    if node.target != aten.cat.default or len(node.args) < 2:
        return None
    parts, last = cast(Sequence[Node], node.args[0]), len(shape_of(node)) - 1
    if len(parts) != 2 or cast(int, node.args[1]) not in (-1, last):
        return None
    values, ones = parts
    return values if is_one(shape_of(ones)[-1]) and number(ones) == 1 else None


def read_ones(form: Form, shadow: Shadow, weights: Weights) -> Output | None:
    """The output as all columns but the last, divided by the last; None where it is anything else."""
    product, values = weights.form.node, values_beside_ones(weights.value)
    users = shadow.users(product)
    place = len(shape_of(product)) - 1
    if form.undivided is None or values is None or len(users) != 2 or len(weights.value_dims[-1]) != 1:
        return None
    if weights.out_dims[-1] != weights.value_dims[-1]:
        return None
    tops = [u for u in users if drops(u, product, place) is False]
    bottoms = [u for u in users if _takes_last(u, product, place)]
    if len(tops) != 1 or len(bottoms) != 1:
        return None
    ends = [
        u for u in shadow.users(tops[0]) if u.target == aten.div.Tensor and u.args == (tops[0], bottoms[0])
    ]
    if len(ends) != 1:
        return None
    width = form.space.fresh(shape_of(values)[-1])
    path = (between(shadow, product, ends[0]) | {product}) - {ends[0]}
    beside = (*weights.value_dims[:-1], width)
    return Output(ends[0], (*weights.out_dims[:-1], width), path, sink=form.sink, value=(values, beside))


def _takes_last(user: Node, node: Node, place: int) -> bool:
    """Whether a slice takes the last column alone."""
    if user.target != aten.slice.Tensor or user.args[0] is not node or len(user.args) < 3:
        return False
    start, size = user.args[2], shape_of(node)[place]
    is_last = start == -1 or (isinstance(size, int) and start == size - 1)
    along = cast(int, user.args[1]) % len(shape_of(node)) == place
    return along and is_one(shape_of(user)[place]) and bool(is_last)
