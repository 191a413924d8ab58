"""Reads decay matrices: M[h, i, j] = exp(g[h] * (i - j)), or exp(c[i] - c[j]), where visible and 0 elsewhere.

The factor of retention (Sun et al. 2023, arXiv:2307.08621, eq. 5) and of Lightning Attention-2 (Qin et al. 2024,
arXiv:2401.04658, eq. 3); with c the running sum of log decays, that of gated linear attention with a scalar gate.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import sympy
from torch.fx import Node

from attnopt.mask import Mask
from attnopt.passes.linear_coefficient import (
    Coefficient,
    Const,
    Read,
    Source,
    coefficient,
    find_tensor,
    times,
)
from attnopt.passes.mask_algebra import KEY, QUERY, algebra_for
from attnopt.passes.mask_bounds import Role
from attnopt.passes.mask_formula import (
    TRUE,
    Call,
    Cases,
    Formula,
    Logic,
    NotUnderstood,
    Number,
    parts_of,
)
from attnopt.passes.mask_numbers import is_constant, moved, reads
from attnopt.passes.mask_reader import MaskReader, as_numbers
from attnopt.passes.mask_rules import reader_for
from attnopt.passes.mask_sums import ONE, Terms, added, is_same_everywhere, scaled, terms_of
from attnopt.passes.mask_writes import arguments, operation, writes_after
from attnopt.passes.sizes import Size, same


@dataclass(frozen=True, slots=True)
class DecayReading:
    """A proven decay matrix: exp(...) where `causal` is visible, 0 elsewhere.

    kind "none": the exponent is 0. "per_head": it is log_decay * (i - j), all leaves have at most the role h.
    "per_token": it is the sum of the log decays of tokens j+1 ... i; leaves have the roles (b, h, i) or fewer.
    cumulative: log_decay is the running sum over tokens instead. A constant log_decay is at most 0; the sign of others
    is not known, and the Log of a leaf that is not positive is NaN where the graph's power may be a number.
    """

    causal: Mask
    kind: Literal["none", "per_head", "per_token"]
    log_decay: Coefficient | None = None
    cumulative: bool = False


def read_decay(
    node: Node, roles: tuple[Role | None, ...], sizes: Mapping[Role, Size], *, at: Node | None = None
) -> DecayReading | None:
    """The decay matrix at `node`, or None where it is not proven to be one.

    node: a tensor of floats, booleans or integers that multiplies Q K^T. roles, sizes, at: as in `read_visible`.
    Where the graph multiplies exp(g * (i - j)) by a 0/1 mask, the exponential may overflow above the diagonal and
    the product be NaN; the reading says 0 there.
    """
    reader = reader_for(node, sizes)
    try:
        return decay_of(reader, as_numbers(reader.logic, reader.read(node, roles, at)))
    except NotUnderstood:
        return None


def decay_of(reader: MaskReader, cases: Cases) -> DecayReading | None:
    """The decay matrix with these elements, or None; may raise NotUnderstood."""
    weighing = {leaf: when for leaf, when in cases.items() if not _is_zero(leaf)}
    visible = reader.logic.disj(weighing.values())
    causal = algebra_for(reader.logic.bounds, visible).mask(visible)
    if causal is None or not weighing:
        return None
    exponents = [_under(reader.logic, when, _exponent(leaf)) for leaf, when in weighing.items()]
    if any(exponent != exponents[0] for exponent in exponents[1:]):
        return None
    return _named(reader, causal, exponents[0])


def _is_zero(leaf: Number) -> bool:
    if isinstance(leaf, Call) and leaf.op == "mul":
        return any(map(_is_zero, leaf.args))
    return leaf == sympy.Integer(0)


def _exponent(leaf: Number) -> Terms:
    """e, for a number that is exp(e)."""
    match leaf:
        case Call("exp", (argument,)):
            return terms_of(argument)
        case Call("pow", (base, power)) if is_same_everywhere(base):
            return scaled(_log(base), terms_of(power))
        case Call("mul", (left, right)):
            return added(_exponent(left), _exponent(right))
        case Call("div", (left, right)):
            return added(_exponent(left), scaled(-ONE, _exponent(right)))
    if leaf == ONE:
        return {}
    raise NotUnderstood


def _log(base: Number) -> Number:
    if not is_constant(base):
        return Call("log", (base,))
    number = float(base)
    if number <= 0 or math.isinf(number):
        raise NotUnderstood
    return math.log(number)


def _under(logic: Logic, condition: Formula, terms: Terms) -> Terms:
    """The terms where the condition holds: there |i - j| may be i - j."""
    return {factor: _decided(logic, condition, expr) for factor, expr in terms.items()}


def _decided(logic: Logic, condition: Formula, expr: sympy.Expr) -> sympy.Expr:
    for inner in expr.atoms(sympy.Abs, sympy.Max, sympy.Min):
        choices = (inner.args[0], -inner.args[0]) if isinstance(inner, sympy.Abs) else inner.args
        sign = -1 if isinstance(inner, sympy.Min) else 1
        beaten = {c: logic.conj(logic.at_most_zero(sign * (d - c)) for d in choices) for c in choices}
        largest = [c for c in choices if logic.given(parts_of(condition), beaten[c]) == TRUE]
        if largest:
            expr = expr.subs(inner, largest[0])
    return sympy.expand(expr)


def _named(reader: MaskReader, causal: Mask, exponent: Terms) -> DecayReading | None:
    if not exponent:
        return DecayReading(causal, "none")
    if len(exponent) == 2:
        return _per_token(reader, causal, exponent)
    ((factor, expr), *others) = exponent.items()
    per_step = sympy.cancel(expr / (QUERY - KEY))
    if others or not is_same_everywhere(factor) or not is_same_everywhere(per_step):
        return None
    rate = times(coefficient(reader, per_step), coefficient(reader, factor))
    grows = isinstance(rate, Const) and rate.value > 0
    return None if grows else DecayReading(causal, "per_head", rate)


def _per_token(reader: MaskReader, causal: Mask, exponent: Terms) -> DecayReading | None:
    """exp(c[i] - c[j]), with c a tensor of the graph."""
    at_query = next((f for f in exponent if reads(f, QUERY) and not reads(f, KEY)), None)
    sq, sk = (reader.logic.bounds.counts[position] for position in (QUERY, KEY))
    if at_query is None or not same(sq, sk):
        return None
    sign = exponent[at_query]
    if sign not in (ONE, -ONE) or exponent.get(moved(at_query, QUERY, KEY)) != -sign:
        return None
    scalars, sums = _without_scalars(at_query)
    found, cumulative = _sums(reader, sums)
    if found is None:
        return None
    for scalar in scalars:
        found = times(found, coefficient(reader, scalar, "bh"))
    return DecayReading(causal, "per_token", times(Const(float(sign)), found), cumulative=cumulative)


def _without_scalars(number: Number) -> tuple[list[Number], Number]:
    """The factors that are the same for all tokens, and the number without them."""
    match number:
        case Call("mul", (left, right)) if is_same_everywhere(left) or is_same_everywhere(right):
            scalar, rest = (left, right) if is_same_everywhere(left) else (right, left)
            scalars, inner = _without_scalars(rest)
            return [scalar, *scalars], inner
    return [], number


def _sums(reader: MaskReader, number: Number) -> tuple[Coefficient | None, bool]:
    """What is summed up, where the number is a running sum; else a tensor with these elements, taken as one."""
    match number:
        case Call("running", (term,)):
            return coefficient(reader, term, "bhi"), False
    leaf = find_tensor(reader, number, "bhi")
    terms = None if leaf is None else _summed(leaf)
    return (None if leaf is None else Read(terms or leaf)), terms is None


def _summed(leaf: Source) -> Source | None:
    """The terms, where the leaf is a running sum over the tokens."""
    if operation(leaf.node) != "cumsum" or "i" not in leaf.roles:
        return None
    held = arguments(leaf.node)
    is_over_tokens = held["dim"] % len(leaf.roles) == leaf.roles.index("i")
    return (
        Source(held["self"], leaf.roles) if is_over_tokens and not writes_after(held["self"], None) else None
    )
