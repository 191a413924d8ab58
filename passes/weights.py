"""Reads what lies between the softmax and the product with the values: casts, views, dropout that does nothing."""

from dataclasses import dataclass

from torch.fx import Node

from attnopt.passes.contraction import Contraction, contraction, label_down, other_operand
from attnopt.passes.layout import CASTS, DROPOUTS, Axes, Dims, Space, dropout_rate, input_node, step_down
from attnopt.rule import Reject
from attnopt.shadow import Shadow


@dataclass(frozen=True, slots=True)
class Weights:
    """The product of the attention weights with the values; path: the nodes from the softmax on."""

    form: Contraction
    value: Node
    value_dims: Dims
    out_dims: Dims
    path: tuple[Node, ...]


def read_weights(space: Space, shadow: Shadow, start: Node, dims: Dims, key: Axes) -> Weights:
    """From the softmax down to the contraction over the keys."""
    node, path = start, [start]
    while True:
        user = _only_user(shadow, node, len(path))
        form = contraction(user)
        if form is not None:
            return _contract(space, form, node, dims, key, tuple(path))
        dims = _step(space, user, node, dims)
        node = user
        path.append(node)


def _only_user(shadow: Shadow, node: Node, depth: int) -> Node:
    users = shadow.users(node)
    if node in shadow.results:
        raise Reject("the attention weights are returned by the graph", node, depth)
    if len(users) != 1:
        count = "never used" if not users else f"used {len(users)} times"
        raise Reject(f"the softmax is {count}, not once to weigh values", node, depth)
    return users[0]


def _contract(
    space: Space, form: Contraction, node: Node, dims: Dims, key: Axes, path: tuple[Node, ...]
) -> Weights:
    if form.lhs is form.rhs:
        raise Reject("the softmax is multiplied by itself", form.node, len(path))
    letters = form.lhs_letters if form.lhs is node else form.rhs_letters
    summed = {
        a
        for letter, axes in zip(letters, dims, strict=True)
        if letter in form.contracted
        for a in space.leaves(axes)
    }
    if summed != set(space.leaves(key)):
        raise Reject(
            "the product after the softmax does not sum over what the softmax normalised",
            form.node,
            len(path),
        )
    if form.added is not None or form.factor != 1.0:
        raise Reject("the product with the values also adds or scales", form.node, len(path))
    value_dims, out_dims = label_down(space, form, node, dims)
    return Weights(form, other_operand(form, node), value_dims, out_dims, path)


def _step(space: Space, user: Node, node: Node, dims: Dims) -> Dims:
    if user.op == "call_function" and user.args and user.args[0] is node:
        if user.target in DROPOUTS and dropout_rate(user) > 0:
            raise Reject(f"dropout {dropout_rate(user):g} on the attention weights", user)
        if user.target in CASTS and user.meta["val"].dtype.is_floating_point:
            return dims
        moved = step_down(space, user, dims)
        if moved is not None and input_node(user) is node:
            return moved
    raise Reject(f"{user.target} between the softmax and the values is not understood", user)
