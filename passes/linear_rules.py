"""Rules for decay matrices beside those for masks: powers of two, running sums, and how people get rid of NaN."""

from collections.abc import Callable, Mapping
from functools import partial
from math import inf, isfinite, log
from types import MappingProxyType

import sympy
from torch.fx import Node

from attnopt.passes.constants import constant
from attnopt.passes.linear_range import range_of
from attnopt.passes.linear_running import running_product, running_sum
from attnopt.passes.mask_bounds import Bounds
from attnopt.passes.mask_formula import Call, Logic, NotUnderstood, Number
from attnopt.passes.mask_numbers import compute, is_constant
from attnopt.passes.mask_reader import At, Rule, Value
from attnopt.passes.mask_rules import RULES
from attnopt.passes.mask_writes import arguments, operation

LN2 = log(2.0)
ZERO = sympy.Integer(0)


def _in_base_e(function: Callable[[Number], Number]) -> Rule:
    def rule(at: At) -> Value:
        return at.logic.lift(function, at.numbers(at.args["self"]))

    return rule


def _nan_to_num(at: At) -> Value:
    if at.args.get("nan") not in (None, 0):
        raise NotUnderstood
    return at.logic.lift(partial(_without_nan, at.logic.bounds), at.numbers(at.args["self"]))


def _without_nan(bounds: Bounds, leaf: Number) -> Number:
    """NaN becomes 0, which no number of a decay is; infinite numbers change too, and are not understood."""
    match leaf:
        case Call("exp", (Call("mul", (left, right)),)) if inf in (left, right):
            # exp(inf * rate): 0, or NaN where the rate is 0.
            if range_of(right if left == inf else left, bounds)[1] > 0:
                raise NotUnderstood
            return ZERO
        case Call("exp" | "pow", _):
            return leaf
        case Call("mul", (left, right)):
            return compute("mul", _without_nan(bounds, left), _without_nan(bounds, right))
    if is_constant(leaf) and isfinite(leaf):
        return leaf
    raise NotUnderstood


def vanished(logic: Logic, leaf: Number) -> Number:
    """exp of minus infinity as 0: of x - inf, whatever x (it is that or not finite), and of inf * x for x < 0."""
    match leaf:
        case Call("exp", (Call("add", (left, right)),)) if -inf in (left, right):
            return ZERO
        case Call("exp", (Call("sub", (left, _)),)) if left == -inf:
            return ZERO
        case Call("exp", (Call("mul", (left, right)),)) if inf in (left, right):
            return ZERO if range_of(right if left == inf else left, logic.bounds)[1] < 0 else leaf
    return leaf


def _index_put(at: At) -> Value:
    """x[x != x] = 0, the in-place way to replace NaN; no other writing by index."""
    places = at.args["indices"]
    if at.args["accumulate"] or len(places) != 1 or constant(at.args["values"]) != 0.0:
        raise NotUnderstood
    if not _is_nan(places[0], at.args["self"]):
        raise NotUnderstood
    return _nan_to_num(at)


def _masked_fill(at: At) -> Value:
    replaces = constant(at.args["value"]) == 0.0 and _is_nan(at.args["mask"], at.args["self"])
    return _nan_to_num(at) if replaces else RULES["masked_fill"](at)


def _where(at: At) -> Value:
    """where(isnan(x), 0, x), or any other choice."""
    then, other = at.args.get("self"), at.args.get("other")
    if constant(then) != 0.0 or not isinstance(other, Node) or not _is_nan(at.args["condition"], other):
        return RULES["where"](at)
    return at.logic.lift(partial(_without_nan, at.logic.bounds), at.numbers(other))


def _is_nan(where: Node, of: Node) -> bool:
    name, held = operation(where), arguments(where)
    return held.get("self") is of and (
        name == "isnan" or (name in ("ne", "not_equal") and held["other"] is of)
    )


#: The rules of masks, and powers of two in base e, so that one form of a decay has to be known.
DECAY_RULES: Mapping[object, Rule] = MappingProxyType(
    {
        **RULES,
        "exp2": _in_base_e(lambda x: compute("exp", compute("mul", x, LN2))),
        "log2": _in_base_e(lambda x: compute("div", compute("log", x), LN2)),
        "cumsum": running_sum,
        "cumprod": running_product,
        "nan_to_num": _nan_to_num,
        "index_put": _index_put,
        "masked_fill": _masked_fill,
        "where": _where,
    }
)
