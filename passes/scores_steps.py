"""One operation between Q K^T and the softmax: what it does to the logits, and where reading goes on above it."""

from collections.abc import Sequence
from dataclasses import replace
from math import inf, isfinite
from typing import Any

import torch
from torch.fx import Node

from attnopt.passes.constants import present, uniform
from attnopt.passes.layout import CASTS, Dims, broadcast_up, input_node
from attnopt.passes.mask_writes import arguments
from attnopt.passes.scores_bounds import clamp, maximum, nan_to_num
from attnopt.passes.scores_moves import (
    Move,
    Step,
    functional,
    is_tensor,
    name_of,
    need_uncapped,
    need_unscaled,
    settled,
    up,
)
from attnopt.passes.scores_shift import tops_of, unexpanded
from attnopt.passes.sizes import is_positive, shape_of
from attnopt.passes.terms import Cast, Fill, Scores, Term
from attnopt.rule import Reject

aten = torch.ops.aten


def moves(node: Node, dims: Dims, here: Scores) -> list[Move]:
    """Where the scores may come from: one place, or one for each operand that may hold them. Raises Reject."""
    step = _STEPS.get(functional(node))
    if step is None:
        raise Reject(f"{name_of(node)} between Q K^T and the softmax is not understood", node, len(here.path))
    found = step(node, dims, here)
    if not found:
        raise Reject(f"{name_of(node)} without scores", node, len(here.path))
    return found


def added_term(node: Node, added: Node, dims: Dims, here: Scores, factor: float) -> Term:
    """What `node` adds to the scores, `settled`, as a term of the logits. Inside a soft cap it is none: Reject."""
    need_uncapped(here, node, "a bias")
    casts = (*here.casts, *_stored(node, added, here))
    return Term(
        added, broadcast_up(dims, shape_of(added)), here.scale * factor, casts=casts, times=here.factors, at=node
    )  # fmt: skip


def _stored(node: Node, added: Node, here: Scores) -> tuple[Cast, ...]:
    """The cast of a sum that is written into a tensor of a shorter range, as by `scores += bias`."""
    made, given = node.meta["val"].dtype, added.meta["val"].dtype
    if not (made.is_floating_point and given.is_floating_point):
        return ()
    return (Cast(made, here.scale),) if torch.finfo(given).max > torch.finfo(made).max else ()


def _cast(node: Node, dims: Dims, here: Scores) -> list[Move]:
    if not node.meta["val"].dtype.is_floating_point:
        raise Reject("scores are cast to a type that is not floating point", node, len(here.path))
    casts = (*here.casts, Cast(node.meta["val"].dtype, settled(here).scale))
    return [(input_node(node), dims, replace(here, casts=casts))]


def _mul(node: Node, dims: Dims, here: Scores) -> list[Move]:
    left, right = node.args[:2]
    pairs = [(s, f) for s, f in ((left, right), (right, left)) if is_tensor(s)]
    for scores, factor in pairs:
        number = uniform(factor)
        if number is not None:
            return [up(scores, dims, replace(here, scale=here.scale * number))]  # type: ignore[arg-type]
    return [_by_tensor(s, f, dims, here) for s, f in pairs]


def _div(node: Node, dims: Dims, here: Scores) -> list[Move]:
    if len(node.args) > 2 or node.kwargs.get("rounding_mode"):
        raise Reject("scores are divided with rounding", node, len(here.path))
    scores, divisor = node.args[:2]
    if not is_tensor(scores):
        raise Reject("a number is divided by the scores", node, len(here.path))
    number = uniform(divisor)
    if number == 0:
        raise Reject("scores are divided by zero", node, len(here.path))
    if number is None:
        return [_by_tensor(scores, divisor, dims, here, inverse=True)]
    return [up(scores, dims, replace(here, scale=here.scale / number))]  # type: ignore[arg-type]


def _by_tensor(scores: Any, factor: Any, dims: Dims, here: Scores, *, inverse: bool = False) -> Move:
    """Scores times (over) a tensor, or a size-dependent number."""
    factor_dims = broadcast_up(dims, shape_of(factor)) if is_tensor(factor) else ()
    below = replace(here, factors=(*here.factors, Term(factor, factor_dims, inverse=inverse)))
    return up(scores, dims, below if here.softcap is None else settled(below))


def _neg(node: Node, dims: Dims, here: Scores) -> list[Move]:
    return [(input_node(node), dims, replace(here, scale=-here.scale))]


def _sum(sign: float, *, swapped: bool = False) -> Step:
    """left + sign * alpha * right; `swapped`: right + sign * alpha * left."""

    def step(node: Node, dims: Dims, here: Scores) -> list[Move]:
        call = arguments(node)
        first, second = call["self"], call["other"]
        pair = (second, first) if swapped else (first, second)
        alpha = present(call["alpha"])
        if alpha is None:
            raise Reject("the factor of what is added to the scores depends on sizes", node, len(here.path))
        return _add(node, dims, here, pair, (1.0, sign * alpha))

    return step


def _add(
    node: Node, dims: Dims, here: Scores, sides: Sequence[Any], weights: tuple[float, float]
) -> list[Move]:
    """Through an addition: the side that leads to Q K^T is read on, the other is a number or a term."""
    found: list[Move] = []
    for n in (0, 1):
        scores, weight, added, added_weight = sides[n], weights[n], sides[1 - n], weights[1 - n]
        if not is_tensor(scores):
            continue
        number = present(added)
        if number is not None:
            return [up(scores, dims, _shifted(node, here, weight, number * added_weight))]
        below = settled(here)
        tops = tops_of(unexpanded(added), scores, dims)
        addend = unexpanded(added) if tops else added
        term = replace(added_term(node, addend, dims, below, added_weight), tops=tops)
        found.append(up(scores, dims, replace(below, scale=below.scale * weight, terms=(*below.terms, term))))
    return found


def _copied(node: Node, dims: Dims, here: Scores) -> list[Move]:
    """A tensor that is overwritten as a whole."""
    source = arguments(node)["src"]
    if source.meta["val"].dtype != node.meta["val"].dtype:
        raise Reject("scores are written into a tensor of another type", node, len(here.path))
    return [up(source, dims, here)]


def _addcmul(node: Node, dims: Dims, here: Scores) -> list[Move]:
    """base + value * left * right."""
    call = arguments(node)
    base, left, right, value = (call[name] for name in ("self", "tensor1", "tensor2", "value"))
    number, below = present(value), settled(here)
    if number is None:
        raise Reject("the factor of what is added to the scores depends on sizes", node, len(here.path))
    term = added_term(node, base, dims, below, 1.0)
    times = replace(below, scale=below.scale * number, terms=(*below.terms, term))
    pairs = ((left, right), (right, left))
    constants = [(scores, uniform(factor)) for scores, factor in pairs if uniform(factor) is not None]
    if constants:
        scores, factor = constants[0]
        return [up(scores, dims, replace(times, scale=times.scale * (factor or 0.0)))]
    added = added_term(node, left, dims, below, number)
    added = replace(added, times=(*added.times, Term(right, broadcast_up(dims, shape_of(right)))))
    onto = up(base, dims, replace(below, terms=(*below.terms, added)))
    return [*(_by_tensor(scores, factor, dims, times) for scores, factor in pairs), onto]


def _shifted(node: Node, here: Scores, weight: float, number: float) -> Scores:
    """All logits plus a number: the same softmax; what is filled in afterwards then lies lower by as much."""
    if not isfinite(number):
        raise Reject("an infinite constant is added to the scores", node, len(here.path))
    if number == 0:
        return replace(here, scale=here.scale * weight)
    here = settled(here)
    need_uncapped(here, node, "a number that is added")
    need_unscaled(here, node, "a number that is added")
    shift = here.scale * number
    fills = tuple(replace(fill, value=fill.value - shift) for fill in here.fills)
    return replace(here, scale=here.scale * weight, fills=fills, shift=here.shift + shift)


def _where(node: Node, dims: Dims, here: Scores) -> list[Move]:
    condition, then, other = node.args[:3]
    for scores, fill, hides in ((then, other, False), (other, then, True)):
        value = present(fill)
        if value is not None and is_tensor(scores):
            return [_filled(node, dims, here, Fill(condition, (), value, hides), scores)]  # type: ignore[arg-type]
    raise Reject("where() chooses between two tensors of scores", node, len(here.path))


def _masked_fill(node: Node, dims: Dims, here: Scores) -> list[Move]:
    scores, condition, fill = node.args[:3]
    value = present(fill)
    if value is None:
        raise Reject("scores are filled with a tensor whose value is not known", node, len(here.path))
    return [_filled(node, dims, here, Fill(condition, (), value, hides=True), scores)]  # type: ignore[arg-type]


def _index_put(node: Node, dims: Dims, here: Scores) -> list[Move]:
    """scores[..., mask] = number."""
    call = arguments(node)
    places: Sequence[Any] = call["indices"] or (None,)
    value = None if call["accumulate"] else present(call["values"])
    mask, held = places[-1], places[-1].meta["val"] if is_tensor(places[-1]) else None
    whole = not any(places[:-1]) and held is not None and len(places) - 1 + held.dim() == len(dims)
    if value is None or held is None or held.dtype != torch.bool or not whole:
        raise Reject(
            "scores are written to at places that are no mask of queries and keys", node, len(here.path)
        )
    return [_filled(node, dims, here, Fill(mask, (), value, hides=True), call["self"])]


def _filled(node: Node, dims: Dims, here: Scores, fill: Fill, scores: Any) -> Move:
    need_uncapped(here, node, "a mask")
    here = settled(here)
    if fill.value != -inf or not all(is_positive(factor.node.meta["val"]) for factor in here.factors):
        need_unscaled(here, node, "a mask")
    made = replace(
        fill, dims=broadcast_up(dims, shape_of(fill.node)), value=here.scale * fill.value,
        dtype=node.meta["val"].dtype, casts=here.casts, at=node,
    )  # fmt: skip
    return up(scores, dims, replace(here, fills=(*here.fills, made)))


def _tanh(node: Node, dims: Dims, here: Scores) -> list[Move]:
    here = settled(here)
    if here.softcap is not None or here.scale <= 0 or here.factors:
        raise Reject("tanh on scores that is not a soft cap", node, len(here.path))
    # logits = c * tanh(y): the cap is c, and the capped scores are c * y.
    return [(input_node(node), dims, replace(here, softcap=here.scale))]


_STEPS: dict[Any, Step] = {
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor, aten.multiply.Scalar), _mul),
    **dict.fromkeys(
        (
            aten.div.Tensor, aten.div.Scalar, aten.true_divide.Tensor, aten.true_divide.Scalar, aten.div.Tensor_mode,
            aten.divide.Tensor, aten.divide.Scalar,
        ),
        _div,
    ),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _sum(1.0)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar, aten.subtract.Tensor, aten.subtract.Scalar), _sum(-1.0)),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), _sum(-1.0, swapped=True)),
    **dict.fromkeys((aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf), _where),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), _masked_fill),
    aten.index_put.default: _index_put,
    **dict.fromkeys((aten.maximum.default, aten.max.other), maximum),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.clamp.Tensor, aten.clamp_min.Tensor), clamp),
    aten.addcmul.default: _addcmul,
    aten.copy.default: _copied,
    aten.neg.default: _neg,
    aten.negative.default: _neg,
    aten.nan_to_num.default: nan_to_num,
    aten.tanh.default: _tanh,
}  # fmt: skip
