"""Reads what lies between the softmax and the product with the values, and tells what it does to the weights.

Casts and views do nothing; dropout, numbers, and tensors that do not vary along the keys change the output alike; a
mask is kept for comparing it with that of the scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from attnopt.passes.constants import constant
from attnopt.passes.contraction import Contraction, contraction, label_down, other_operand
from attnopt.passes.layout import (
    CASTS,
    Axes,
    Axis,
    Dims,
    Space,
    broadcast_up,
    dropout_rate,
    input_node,
    step_down,
)
from attnopt.passes.sizes import same, shape_of
from attnopt.passes.softmax_form import is_given, narrowed, number, onto, truth_of
from attnopt.passes.softmax_nodes import between, depends_on
from attnopt.passes.terms import Fill, Term
from attnopt.rule import Reject
from attnopt.shadow import Shadow

aten = torch.ops.aten

#: A longer chain is no attention that somebody wrote down.
LONGEST = 40


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of the weights before they meet the values.

    factor, times: what they are multiplied by, none of which varies along the keys; values: tensors that do. kept:
    conditions by rows, outside of which they are 0. hidden: masks outside of which they are 0, even where they were
    NaN. multiplied: masks of 0 and 1 that they are multiplied by. zeroed: NaN becomes 0. dropout: the probability of
    each weight to become 0.
    """

    factor: float = 1.0
    times: tuple[Term, ...] = ()
    values: tuple[Term, ...] = ()
    kept: tuple[Fill, ...] = ()
    hidden: tuple[Fill, ...] = ()
    multiplied: tuple[Fill, ...] = ()
    zeroed: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, slots=True)
class Weights:
    """The product of the attention weights with the values; path: the nodes from the softmax on."""

    form: Contraction
    value: Node
    value_dims: Dims
    out_dims: Dims
    path: tuple[Node, ...]
    change: Change = field(default_factory=Change)


@dataclass(frozen=True, slots=True)
class Here:
    """How far reading has come: the weights as `node` holds them."""

    node: Node
    dims: Dims
    path: tuple[Node, ...]
    change: Change = field(default_factory=Change)


def read_weights(space: Space, shadow: Shadow, start: Node, dims: Dims, key: Axes) -> Weights:
    """From the softmax down to the contraction over the keys; the first, where the weights go several ways.

    Raises Reject with what stopped the way that came furthest.
    """
    return WeightsReader(space, shadow, key).read(Here(start, dims, (start,)))


@dataclass(frozen=True, slots=True)
class WeightsReader:
    """Walks downwards from the weights of one softmax."""

    space: Space
    shadow: Shadow
    key: Axes

    def read(self, here: Here) -> Weights:
        """The product with the values below."""
        rejects: list[Reject] = []
        for user in self.shadow.users(here.node):
            try:
                return self._through(user, here)
            except Reject as reject:
                rejects.append(Reject(reject.reason, reject.node, max(reject.depth, len(here.path))))
        if not rejects:
            end = "returned by the graph" if here.node in self.shadow.results else "never used"
            rejects = [Reject(f"the softmax is {end}, and weighs no values", here.node, len(here.path))]
        raise max(rejects, key=lambda reject: reject.depth)

    def _through(self, user: Node, here: Here) -> Weights:
        form = contraction(user)
        if form is not None:
            return self._contract(form, here)
        if len(here.path) > LONGEST:
            raise Reject(f"more than {LONGEST} operations between the softmax and the values", user)
        step = _STEPS.get(onto(user, here.node))
        if step is None:
            return self.read(replace(here, node=user, dims=self._moved(user, here), path=(*here.path, user)))
        change = step(self, user, here)
        _need_same_shape(user, here.node)
        passed = sorted(between(self.shadow, here.node, user), key=lambda n: self.shadow.order[n])
        return self.read(replace(here, node=user, path=(*here.path, *passed), change=change))

    def _moved(self, user: Node, here: Here) -> Dims:
        """Through a cast or a view."""
        if user.op == "call_function" and user.args and user.args[0] is here.node:
            if user.target in CASTS and user.meta["val"].dtype.is_floating_point:
                return here.dims
            moved = step_down(self.space, user, here.dims)
            if moved is not None and input_node(user) is here.node:
                return moved
        advice = _INSTEAD.get(user.target, "")
        raise Reject(f"{user.target} between the softmax and the values is not understood{advice}", user)

    def _contract(self, form: Contraction, here: Here) -> Weights:
        if form.lhs is form.rhs:
            raise Reject("the softmax is multiplied by itself", form.node)
        if here.node not in (form.lhs, form.rhs) or form.added is not None:
            raise Reject("the product with the values also adds something", form.node)
        letters, others = form.lhs_letters, form.rhs_letters
        if form.lhs is not here.node:
            letters, others = others, letters
        if self._summed(form, letters, here.dims) != set(self.space.leaves(self.key)):
            raise Reject(
                "the product after the softmax does not sum over what the softmax normalised", form.node
            )
        value = other_operand(form, here.node)
        if depends_on(self.shadow, value, {here.path[0]}):
            raise Reject("the weights are multiplied by something that is made of them", form.node)
        value_dims, out_dims = label_down(self.space, form, here.node, here.dims)
        if not self._summed(form, others, value_dims) <= set(self.space.leaves(self.key)):
            raise Reject("the values are summed along something that the weights do not have", form.node)
        change = replace(here.change, factor=here.change.factor * form.factor)
        return Weights(form, value, value_dims, out_dims, here.path, change)

    def _summed(self, form: Contraction, letters: Sequence[str], dims: Dims) -> set[Axis]:
        """The axes of one operand that a contraction sums over."""
        pairs = zip(letters, dims, strict=True)
        return {a for letter, axes in pairs if letter in form.contracted for a in self.space.leaves(axes)}

    def times(self, user: Node, other: Any, here: Here, *, inverse: bool = False) -> Change:
        """The weights times (over) a number or a tensor."""
        by = constant(other)
        if by is not None:
            if inverse and by == 0:
                raise Reject("the weights are divided by zero", user)
            return replace(here.change, factor=here.change.factor * (1 / by if inverse else by))
        row = self.beside(user, other, here)
        if inverse and is_given(row[0] if row is not None else other):
            raise Reject("the weights are divided by data, NaN where that is 0; divide the output", user)
        if row is not None:
            return replace(here.change, times=(*here.change.times, Term(*row, inverse=inverse)))
        dims = broadcast_up(here.dims, shape_of(other))
        truth = truth_of(self.space, other, dims)
        if truth is None:
            by_key = Term(other, dims, inverse=inverse, at=user)
            return replace(here.change, values=(*here.change.values, by_key))
        fill = Fill(*truth, -torch.inf, hides=False)
        return replace(here.change, multiplied=(*here.change.multiplied, fill))

    def masked(self, user: Node, condition: Any, here: Here, *, hides: bool) -> Change:
        """The weights set to 0 where the condition hides them."""
        nan = _where_nan(condition, here.node)
        if nan is not None:
            if nan is not hides:
                raise Reject("the weights are set to 0 where they are numbers", user)
            return replace(here.change, zeroed=True)
        row = self.beside(user, condition, here)
        if row is not None:
            return replace(here.change, kept=(*here.change.kept, Fill(*row, -torch.inf, hides)))
        dims = broadcast_up(here.dims, shape_of(condition))
        hidden = Fill(condition, dims, -torch.inf, hides)
        return replace(here.change, hidden=(*here.change.hidden, hidden))

    def beside(self, user: Node, other: Any, here: Here) -> tuple[Node, Dims] | None:
        """A tensor that is broadcast onto the weights, labelled; None if it varies along the keys."""
        if not isinstance(other, Node) or other.meta.get("val") is None:
            raise Reject("the weights are multiplied by something that is no tensor", user)
        if depends_on(self.shadow, other, {here.path[0]}):
            raise Reject("the weights are multiplied by something that is made of them", user)
        return narrowed(self.space, other, here.dims, self.key)


def _need_same_shape(user: Node, node: Node) -> None:
    after, before = shape_of(user), shape_of(node)
    if len(after) != len(before) or not all(same(a, b) for a, b in zip(after, before, strict=True)):
        raise Reject("the weights are broadcast along another tensor", user)


def _where_nan(condition: Any, node: Node) -> bool | None:
    """Whether a condition is True where the weights are NaN; None if it is something else. Whole rows are NaN."""
    if not isinstance(condition, Node):
        return None
    if condition.target in (aten.logical_not.default, aten.bitwise_not.default):
        inner = _where_nan(condition.args[0], node)
        return None if inner is None else not inner
    if condition.target == aten.isnan.default:
        return True if condition.args[0] is node else None
    if condition.target in (aten.ne.Tensor, aten.eq.Tensor) and condition.args == (node, node):
        return condition.target == aten.ne.Tensor
    return None


def _dropped(reader: WeightsReader, user: Node, here: Here) -> Change:
    del reader
    rate = dropout_rate(user)
    if rate > 0 and here.change.dropout > 0:
        raise Reject("dropout twice on the attention weights", user)
    if rate >= 1:
        raise Reject(f"dropout {rate:g} on the attention weights leaves nothing", user)
    return replace(here.change, dropout=rate or here.change.dropout)


def _mul(reader: WeightsReader, user: Node, here: Here) -> Change:
    left, right = user.args[:2]
    if left is right:
        raise Reject("the weights are multiplied by themselves", user)
    return reader.times(user, right if left is here.node else left, here)


def _div(reader: WeightsReader, user: Node, here: Here) -> Change:
    if user.args[0] is not here.node:
        raise Reject("something is divided by the weights", user)
    return reader.times(user, user.args[1], here, inverse=True)


def _neg(reader: WeightsReader, user: Node, here: Here) -> Change:
    del reader, user
    return replace(here.change, factor=-here.change.factor)


def _masked_fill(reader: WeightsReader, user: Node, here: Here) -> Change:
    weights, condition, value = user.args[:3]
    if weights is not here.node or constant(value) != 0:
        raise Reject("the weights are filled with something other than 0", user)
    return reader.masked(user, condition, here, hides=True)


def _where(reader: WeightsReader, user: Node, here: Here) -> Change:
    condition, then, other = user.args[:3]
    if then is here.node and _is_zero(other):
        return reader.masked(user, condition, here, hides=False)
    if other is here.node and _is_zero(then):
        return reader.masked(user, condition, here, hides=True)
    raise Reject("where() chooses between the weights and something other than 0", user)


def _is_zero(value: Any) -> bool:
    return number(value) == 0


def _nan_to_num(reader: WeightsReader, user: Node, here: Here) -> Change:
    del reader
    nan = user.args[1] if len(user.args) > 1 else user.kwargs.get("nan")
    if nan not in (None, 0, 0.0):
        raise Reject(f"NaN among the weights becomes {nan}", user)
    return replace(here.change, zeroed=True)


#: What says the same, by the linearity of the product with the values.
_ADDED = "; multiply with the values first, and add the outputs"
_CUT = "; multiply all weights with the values in one product, and cut that"
_INSTEAD: dict[Any, str] = {
    **dict.fromkeys(CASTS, "; no kernel takes weights that are not floating point"),
    **dict.fromkeys((aten.add.Tensor, aten.sub.Tensor), _ADDED),
    **dict.fromkeys((aten.slice.Tensor, aten.select.int), _CUT),
}

_STEPS: dict[Any, Callable[[WeightsReader, Node, Here], Change]] = {
    aten.dropout.default: _dropped,
    aten.nan_to_num.default: _nan_to_num,
    aten.neg.default: _neg,
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _mul),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor), _div),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _where),
}
