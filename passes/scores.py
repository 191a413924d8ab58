"""Reads what lies between Q K^T and the softmax: scales, masks, biases, a cap, casts and views, in any order."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.constants import constant
from attnopt.passes.contraction import Contraction, contraction, label_up
from attnopt.passes.layout import CASTS, Dims, Space, broadcast_up, input_node, step_up
from attnopt.passes.sizes import shape_of
from attnopt.passes.terms import Cast, Fill, Scores, Term
from attnopt.rule import Reject
from attnopt.shadow import Shadow

aten = torch.ops.aten

#: A longer chain is no attention that somebody wrote down.
LONGEST = 200


@dataclass(frozen=True, slots=True)
class ScoreReader:
    """Walks from the softmax upwards; each step folds one node into a Scores."""

    space: Space
    shadow: Shadow

    def read(self, node: Node, dims: Dims, below: Scores) -> Scores:
        """The scores of which `node` is a part: `below` is what the nodes under it have said."""
        here = replace(below, path=(*below.path, node))
        self._need_inner(node, here)
        if (form := contraction(node)) is not None:
            return self._contract(form, dims, here)
        moved = step_up(self.space, node, dims)
        if moved is not None:
            return self.read(*moved, here)
        step = _STEPS.get(_functional(node))
        if step is None:
            raise Reject(
                f"{_name(node)} between Q K^T and the softmax is not understood", node, len(here.path)
            )
        return step(self, node, dims, here)

    def _need_inner(self, node: Node, here: Scores) -> None:
        """Each value on the way is used once, so that no node is read twice, however the graph forks."""
        if len(here.path) > LONGEST:
            raise Reject(
                f"more than {LONGEST} operations between Q K^T and the softmax", node, len(here.path)
            )
        others = [user for user in self.shadow.users(node) if user not in here.path[-2:-1]]
        if len(here.path) > 1 and others:
            raise Reject(
                f"an inner value of the attention ({node.name}) is also used by {others[0].name}",
                node,
                len(here.path),
            )

    def _contract(self, form: Contraction, dims: Dims, here: Scores) -> Scores:
        if not form.node.meta["val"].dtype.is_floating_point:
            raise Reject(
                f"the scores are {form.node.meta['val'].dtype}, not floating point", form.node, len(here.path)
            )
        terms = here.terms
        if form.added is not None:
            _need_outermost(here, form.node, "a bias")
            terms = (*terms, _term(form.added, dims, here, form.added_factor))
        q, k = label_up(self.space, form, dims)
        return replace(here, scale=here.scale * form.factor, terms=terms, form=form, q=q, k=k)

    def either(
        self, node: Node, dims: Dims, here: Scores, sides: list[tuple[Node, Node, float, float]]
    ) -> Scores:
        """Through an addition: the side that leads to Q K^T is read on, the other is a term.

        sides: (scores, added, factor of the scores, factor of the added tensor).
        """
        _need_outermost(here, node, "a bias")
        found, reasons = [], []
        for scores, added, sign, added_sign in sides:
            other = _term(added, dims, here, added_sign)
            below = replace(here, scale=here.scale * sign, terms=(*here.terms, other))
            try:
                found.append(self.read(scores, broadcast_up(dims, shape_of(scores)), below))
            except Reject as reject:
                reasons.append(reject)
        if not found:
            raise max(reasons, key=lambda r: r.depth)
        return max(found, key=lambda s: sum(len(a) for a in s.q + s.k))


def _need_outermost(here: Scores, node: Node, what: str) -> None:
    """Masks and biases are understood outside of a soft cap and of a scale that is a tensor, not inside."""
    _need_uncapped(here, node, what)
    if here.factors:
        raise Reject(f"{what} inside a scale that is a tensor is not understood", node, len(here.path))


def _need_uncapped(here: Scores, node: Node, what: str) -> None:
    if here.softcap is not None:
        raise Reject(f"{what} inside a soft cap is not understood", node, len(here.path))


def _term(node: Node, dims: Dims, here: Scores, factor: float) -> Term:
    return Term(node, broadcast_up(dims, shape_of(node)), here.scale * factor, casts=here.casts)


def _tensors(node: Node) -> list[Node]:
    return [a for a in node.args if isinstance(a, Node) and isinstance(a.meta.get("val"), Tensor)]


def _functional(node: Node) -> Any:
    """The out-of-place form of an in-place overload: its value is what the in-place one returns."""
    target = node.target
    name = getattr(getattr(target, "_schema", None), "name", "")
    if not name.endswith("_") or name.endswith("__"):
        return target
    packet = getattr(aten, name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, target._overloadname, target)  # type: ignore[union-attr]


def _name(node: Node) -> str:
    return str(getattr(node.target, "_schema", node).name if hasattr(node.target, "_schema") else node.target)


def _cast(reader: ScoreReader, node: Node, dims: Dims, here: Scores) -> Scores:
    if not node.meta["val"].dtype.is_floating_point:
        raise Reject("scores are cast to a type that is not floating point", node, len(here.path))
    casts = (*here.casts, Cast(node.meta["val"].dtype, here.scale))
    return reader.read(input_node(node), dims, replace(here, casts=casts))


def _mul(reader: ScoreReader, node: Node, dims: Dims, here: Scores) -> Scores:
    left, right = node.args[:2]
    for scores, factor in ((left, right), (right, left)):
        number = constant(factor)
        if number is not None and isinstance(scores, Node):
            return reader.read(scores, dims, replace(here, scale=here.scale * number))
    sides = [(s, f) for s, f in ((left, right), (right, left)) if isinstance(s, Node) and isinstance(f, Node)]
    return _by_tensor(reader, node, dims, here, sides)


def _div(reader: ScoreReader, node: Node, dims: Dims, here: Scores) -> Scores:
    if len(node.args) > 2 or node.kwargs.get("rounding_mode"):
        raise Reject("scores are divided with rounding", node, len(here.path))
    number = constant(node.args[1])
    if number == 0:
        raise Reject("scores are divided by zero", node, len(here.path))
    if number is None:
        return _by_tensor(reader, node, dims, here, [(input_node(node), node.args[1])], inverse=True)  # type: ignore[list-item]
    return reader.read(input_node(node), dims, replace(here, scale=here.scale / number))


def _by_tensor(
    reader: ScoreReader,
    node: Node,
    dims: Dims,
    here: Scores,
    sides: list[tuple[Node, Node]],
    *,
    inverse: bool = False,
) -> Scores:
    """Scores times (over) a tensor, or a size-dependent number: a factor on q, if it does not vary with the key."""
    reasons = []
    for scores, factor in sides:
        if not isinstance(scores.meta.get("val"), Tensor):
            continue
        factor_dims = (
            broadcast_up(dims, shape_of(factor)) if isinstance(factor.meta.get("val"), Tensor) else ()
        )
        below = replace(here, factors=(*here.factors, Term(factor, factor_dims, inverse=inverse)))
        try:
            return reader.read(scores, broadcast_up(dims, shape_of(scores)), below)
        except Reject as reject:
            reasons.append(reject)
    raise max(reasons, key=lambda r: r.depth) if reasons else Reject("a product without scores", node)


def _neg(reader: ScoreReader, node: Node, dims: Dims, here: Scores) -> Scores:
    return reader.read(input_node(node), dims, replace(here, scale=-here.scale))


def _add(reader: ScoreReader, node: Node, dims: Dims, here: Scores) -> Scores:
    return _sum(reader, node, dims, here, sign=1.0)


def _sub(reader: ScoreReader, node: Node, dims: Dims, here: Scores) -> Scores:
    return _sum(reader, node, dims, here, sign=-1.0)


def _sum(reader: ScoreReader, node: Node, dims: Dims, here: Scores, sign: float) -> Scores:
    left, right = node.args[:2]
    weight = sign * float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    for scores, number in ((left, constant(right)), (right, constant(left))):
        if (
            isinstance(scores, Node)
            and number is not None
            and number == number
            and abs(number) != float("inf")
        ):
            return _shift(reader, scores, dims, here, number, weight, first=scores is left)
    if not (isinstance(left, Node) and isinstance(right, Node)):
        raise Reject("an infinite constant is added to the scores", node, len(here.path))
    return reader.either(node, dims, here, [(left, right, 1.0, weight), (right, left, weight, 1.0)])


def _shift(
    reader: ScoreReader, scores: Node, dims: Dims, here: Scores, number: float, weight: float, *, first: bool
) -> Scores:
    """scores + weight * number, or number + weight * scores: the same softmax as without the number.

    What is filled in afterwards then lies lower by as much.
    """
    _need_uncapped(here, scores, "a number that is added")
    shift = here.scale * number * (weight if first else 1.0)
    fills = tuple(replace(fill, value=fill.value - shift) for fill in here.fills)
    return reader.read(
        scores, dims, replace(here, scale=here.scale * (1.0 if first else weight), fills=fills)
    )


def _where(reader: ScoreReader, node: Node, dims: Dims, here: Scores) -> Scores:
    condition, then, other = node.args[:3]
    for scores, fill, hides in ((then, other, False), (other, then, True)):
        value = constant(fill)
        if value is not None and isinstance(scores, Node) and isinstance(condition, Node):
            return _fill(reader, node, dims, here, scores, condition, value, hides)
    raise Reject("where() chooses between two tensors of scores", node, len(here.path))


def _masked_fill(reader: ScoreReader, node: Node, dims: Dims, here: Scores) -> Scores:
    scores, condition, fill = node.args[:3]
    value = constant(fill)
    if value is None or not isinstance(scores, Node) or not isinstance(condition, Node):
        raise Reject("scores are filled with a tensor", node, len(here.path))
    return _fill(reader, node, dims, here, scores, condition, value, hides=True)


def _fill(
    reader: ScoreReader,
    node: Node,
    dims: Dims,
    here: Scores,
    scores: Node,
    condition: Node,
    value: float,
    hides: bool,  # noqa: FBT001 - which way the condition reads
) -> Scores:
    _need_outermost(here, node, "a mask")
    dtype = node.meta["val"].dtype
    fill = Fill(
        condition, broadcast_up(dims, shape_of(condition)), here.scale * value, hides, dtype, here.casts
    )
    return reader.read(scores, broadcast_up(dims, shape_of(scores)), replace(here, fills=(*here.fills, fill)))


def _tanh(reader: ScoreReader, node: Node, dims: Dims, here: Scores) -> Scores:
    if here.softcap is not None or here.scale <= 0 or here.factors:
        raise Reject("tanh on scores that is not a soft cap", node, len(here.path))
    # logits = c * tanh(y): the cap is c, and the capped scores are c * y.
    return reader.read(input_node(node), dims, replace(here, softcap=here.scale))


_STEPS: dict[Any, Callable[[ScoreReader, Node, Dims, Scores], Scores]] = {
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _mul),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, aten.div.Tensor_mode), _div),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _add),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _sub),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    aten.neg.default: _neg,
    aten.tanh.default: _tanh,
}
