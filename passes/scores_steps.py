"""One operation between Q K^T and the softmax: what it does to the logits, and where reading goes on above it."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.constants import uniform
from attnopt.passes.layout import CASTS, Dims, broadcast_up, input_node
from attnopt.passes.mask_writes import arguments
from attnopt.passes.scores_shift import tops_of
from attnopt.passes.sizes import shape_of
from attnopt.passes.terms import NEGLIGIBLE, Cast, Fill, Floor, Scores, Term
from attnopt.rule import Reject

aten = torch.ops.aten

#: A value above, its dimensions, and what is known of the scores by then.
Move = tuple[Node, Dims, Scores]
Step = Callable[[Node, Dims, Scores], list[Move]]


def moves(node: Node, dims: Dims, here: Scores) -> list[Move]:
    """Where the scores may come from: one place, or one for each operand that may hold them. Raises Reject."""
    step = _STEPS.get(functional(node))
    if step is None:
        raise Reject(f"{_name(node)} between Q K^T and the softmax is not understood", node, len(here.path))
    found = step(node, dims, here)
    if not found:
        raise Reject(f"{_name(node)} without scores", node, len(here.path))
    return found


def functional(node: Node) -> Any:
    """The out-of-place form of an in-place overload: its value is what the in-place one returns."""
    target = node.target
    name = getattr(getattr(target, "_schema", None), "name", "")
    if not name.endswith("_") or name.endswith("__"):
        return target
    packet = getattr(aten, name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, target._overloadname, target)  # type: ignore[union-attr]


def added_term(node: Node, added: Node, dims: Dims, here: Scores, factor: float) -> Term:
    """What `node` adds to the scores, as a term of the logits. Inside a soft cap it is none: Reject."""
    _need_uncapped(here, node, "a bias")
    return Term(
        added, broadcast_up(dims, shape_of(added)), here.scale * factor, casts=here.casts, times=here.factors, at=node
    )  # fmt: skip


def _need_uncapped(here: Scores, node: Node, what: str) -> None:
    if here.softcap is not None:
        raise Reject(f"{what} inside a soft cap is not understood", node, len(here.path))


def _need_unscaled(here: Scores, node: Node, what: str) -> None:
    """What stands inside a scale that is data of unknown sign may come out as its opposite."""
    if here.factors:
        raise Reject(f"{what} inside a scale that is a tensor is not understood", node, len(here.path))


def _name(node: Node) -> str:
    return str(getattr(getattr(node.target, "_schema", None), "name", node.target))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


def _up(scores: Node, dims: Dims, here: Scores) -> Move:
    """To an operand that may be broadcast to the result."""
    return scores, broadcast_up(dims, shape_of(scores)), here


def _cast(node: Node, dims: Dims, here: Scores) -> list[Move]:
    if not node.meta["val"].dtype.is_floating_point:
        raise Reject("scores are cast to a type that is not floating point", node, len(here.path))
    casts = (*here.casts, Cast(node.meta["val"].dtype, here.scale))
    return [(input_node(node), dims, replace(here, casts=casts))]


def _mul(node: Node, dims: Dims, here: Scores) -> list[Move]:
    left, right = node.args[:2]
    pairs = [(s, f) for s, f in ((left, right), (right, left)) if _is_tensor(s)]
    for scores, factor in pairs:
        number = uniform(factor)
        if number is not None:
            return [_up(scores, dims, replace(here, scale=here.scale * number))]  # type: ignore[arg-type]
    return [_by_tensor(s, f, dims, here) for s, f in pairs]


def _div(node: Node, dims: Dims, here: Scores) -> list[Move]:
    if len(node.args) > 2 or node.kwargs.get("rounding_mode"):
        raise Reject("scores are divided with rounding", node, len(here.path))
    scores, divisor = node.args[:2]
    if not _is_tensor(scores):
        raise Reject("a number is divided by the scores", node, len(here.path))
    number = uniform(divisor)
    if number == 0:
        raise Reject("scores are divided by zero", node, len(here.path))
    if number is None:
        return [_by_tensor(scores, divisor, dims, here, inverse=True)]
    return [_up(scores, dims, replace(here, scale=here.scale / number))]  # type: ignore[arg-type]


def _by_tensor(scores: Any, factor: Any, dims: Dims, here: Scores, *, inverse: bool = False) -> Move:
    """Scores times (over) a tensor, or a size-dependent number."""
    factor_dims = broadcast_up(dims, shape_of(factor)) if _is_tensor(factor) else ()
    factors = (*here.factors, Term(factor, factor_dims, inverse=inverse))
    return _up(scores, dims, replace(here, factors=factors))


def _neg(node: Node, dims: Dims, here: Scores) -> list[Move]:
    return [(input_node(node), dims, replace(here, scale=-here.scale))]


def _sum(sign: float, *, swapped: bool = False) -> Step:
    """left + sign * alpha * right; `swapped`: right + sign * alpha * left."""

    def step(node: Node, dims: Dims, here: Scores) -> list[Move]:
        call = arguments(node)
        first, second = call["self"], call["other"]
        pair = (second, first) if swapped else (first, second)
        alpha = uniform(call["alpha"])
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
        if not _is_tensor(scores):
            continue
        below = replace(here, scale=here.scale * weight)
        number = uniform(added)
        if number is not None and isfinite(number):
            return [_up(scores, dims, _shifted(node, below, here.scale * number * added_weight))]
        if number is not None:
            raise Reject("an infinite constant is added to the scores", node, len(here.path))
        term = replace(added_term(node, added, dims, here, added_weight), tops=tops_of(added, scores, dims))
        found.append(_up(scores, dims, replace(below, terms=(*here.terms, term))))
    return found


def _shifted(node: Node, here: Scores, shift: float) -> Scores:
    """All logits plus a number: the same softmax; what is filled in afterwards then lies lower by as much."""
    _need_uncapped(here, node, "a number that is added")
    _need_unscaled(here, node, "a number that is added")
    fills = tuple(replace(fill, value=fill.value - shift) for fill in here.fills)
    return replace(here, fills=fills, shift=here.shift + shift)


def _where(node: Node, dims: Dims, here: Scores) -> list[Move]:
    condition, then, other = node.args[:3]
    for scores, fill, hides in ((then, other, False), (other, then, True)):
        value = uniform(fill)
        if value is not None and _is_tensor(scores):
            return [_filled(node, dims, here, Fill(condition, (), value, hides), scores)]  # type: ignore[arg-type]
    raise Reject("where() chooses between two tensors of scores", node, len(here.path))


def _masked_fill(node: Node, dims: Dims, here: Scores) -> list[Move]:
    scores, condition, fill = node.args[:3]
    value = uniform(fill)
    if value is None:
        raise Reject("scores are filled with a tensor whose value is not known", node, len(here.path))
    return [_filled(node, dims, here, Fill(condition, (), value, hides=True), scores)]  # type: ignore[arg-type]


def _filled(node: Node, dims: Dims, here: Scores, fill: Fill, scores: Any) -> Move:
    _need_uncapped(here, node, "a mask")
    if any(_is_tensor(factor.node) for factor in here.factors) or (here.factors and fill.value != -inf):
        _need_unscaled(here, node, "a mask")  # a number that sizes make is positive: -inf stays what it is
    made = replace(
        fill, dims=broadcast_up(dims, shape_of(fill.node)), value=here.scale * fill.value,
        dtype=node.meta["val"].dtype, casts=here.casts, at=node,
    )  # fmt: skip
    return _up(scores, dims, replace(here, fills=(*here.fills, made)))


def _maximum(node: Node, dims: Dims, here: Scores) -> list[Move]:
    left, right = node.args[:2]
    for scores, bound in ((left, right), (right, left)):
        if _is_tensor(scores) and uniform(bound) is not None:
            return [_raised(node, dims, here, scores, uniform(bound), halves=True)]
    raise Reject("the larger of two tensors is taken as scores", node, len(here.path))


def _clamp(node: Node, dims: Dims, here: Scores) -> list[Move]:
    call = arguments(node)
    if call.get("max") is not None and uniform(call["max"]) != inf:
        raise Reject(
            "scores are clamped from above, which no kernel does; clamp the queries or keys instead",
            node,
            len(here.path),
        )
    return [
        _raised(node, dims, here, call["self"], uniform(call["min"]) if call["min"] is not None else -inf)
    ]


def _raised(
    node: Node, dims: Dims, here: Scores, scores: Any, bound: float | None, *, halves: bool = False
) -> Move:
    """max(scores, bound), where only hidden scores lie below the bound."""
    lowest = torch.finfo(node.meta["val"].dtype).min
    if bound is None or not bound * here.scale <= max(NEGLIGIBLE, lowest):
        shown = "a tensor" if bound is None else f"{bound:g}"
        raise Reject(
            f"scores are raised to at least {shown}, which visible keys may notice", node, len(here.path)
        )
    if bound == -inf:
        return _up(scores, dims, here)
    _need_uncapped(here, node, "a lower bound")
    _need_unscaled(here, node, "a lower bound")
    return _up(scores, dims, replace(here, casts=(*here.casts, Floor(bound, here.scale, halves))))


def _nan_to_num(node: Node, dims: Dims, here: Scores) -> list[Move]:
    del dims
    raise Reject(
        "nan_to_num turns scores that are NaN into numbers, which no kernel does; it can go where inputs are finite",
        node,
        len(here.path),
    )


def _tanh(node: Node, dims: Dims, here: Scores) -> list[Move]:
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
    **dict.fromkeys((aten.maximum.default, aten.max.other), _maximum),
    **dict.fromkeys((aten.clamp.default, aten.clamp_min.default, aten.clamp.Tensor, aten.clamp_min.Tensor), _clamp),
    aten.neg.default: _neg,
    aten.negative.default: _neg,
    aten.nan_to_num.default: _nan_to_num,
    aten.tanh.default: _tanh,
}  # fmt: skip
