"""Proves that a bias is linear in the distance: slope * (j - i - offset), or -slope * |j - i - offset|.

Press et al. 2022, "Train short, test long", arXiv:2108.12409, section 3. The slope stays whatever tensor the graph
has; what is proven is how the bias depends on the positions, by the mask calculus. A bias that is rounded to less than
fp32 on the way is another one far from the diagonal, and stays a tensor.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from attnopt.mask import FULL, Length, Mask
from attnopt.passes.alibi_terms import Factor, find_slopes, steady_terms
from attnopt.passes.mask_algebra import KEY, QUERY, algebra_for
from attnopt.passes.mask_bounds import Role
from attnopt.passes.mask_formula import TRUE, Call, Cases, Formula, Logic, NotUnderstood, Number, parts_of
from attnopt.passes.mask_numbers import is_constant
from attnopt.passes.mask_reader import MaskReader, as_numbers
from attnopt.passes.mask_rules import reader_for
from attnopt.passes.mask_sums import ONE, Terms, is_same_everywhere
from attnopt.passes.sizes import Size

#: A finite number at or below this absorbs the score and the slope that it is added to.
ABSORBING = -1e30
#: Types that hold a slope times a distance as precisely as a kernel computes it.
PRECISE = frozenset({torch.float32, torch.float64})


@dataclass(frozen=True, slots=True)
class Line:
    """A bias that is proven to be linear.

    slope: the product of these. symmetric: -slope * |j - i - offset|, else slope * (j - i - offset). exact: whether
    that is all; else something that is the same along each row was left out, and the offset may be any (None).
    visible: where the bias is this; elsewhere it hides the key, as `fill` does.
    """

    slope: tuple[Factor, ...]
    offset: Length | None
    symmetric: bool
    exact: bool
    visible: Mask = FULL
    fill: float = -math.inf


@dataclass(frozen=True, slots=True)
class Form:
    """slope * times * (j - i - offset), or minus its magnitude, and `rest`, alike along a row; no offset: j alone."""

    times: sympy.Expr
    offset: sympy.Expr | None
    symmetric: bool = False
    rest: tuple[tuple[Number, sympy.Expr], ...] = ()


def read_line(
    node: Node, roles: tuple[Role | None, ...], sizes: Mapping[Role, Size], *, at: Node | None = None
) -> Line | None:
    """The line that a float tensor added to the scores is, or None where it is not proven to be one.

    node, roles, sizes, at: as in `masks.read_additive`.
    """
    if not node.meta["val"].dtype.is_floating_point:
        return None
    reader = reader_for(node, sizes)
    try:
        cases = as_numbers(reader.logic, reader.read(node, roles, at))
        return _line(reader, cases) if _is_precise(reader) else None
    except NotUnderstood:
        return None


def _is_precise(reader: MaskReader) -> bool:
    """Whether no tensor on the way holds a product with a position in a type that would round it."""
    return all(
        node.meta["val"].dtype in PRECISE
        for (node, _), held in reader.reached().items()
        if isinstance(node.meta["val"], Tensor) and not isinstance(held, Formula) and _has_product(held)
    )


def _has_product(held: Cases) -> bool:
    return any(isinstance(leaf, Call) and not is_same_everywhere(leaf) for leaf in held)


def _line(reader: MaskReader, cases: Cases) -> Line | None:
    told = [(when, steady_terms(leaf)) for leaf, when in cases.items()]
    shown = [(when, terms) for when, terms in told if _fill(terms) is None]
    fills = {fill for _, terms in told if (fill := _fill(terms)) is not None}
    visible = reader.logic.disj(when for when, _ in shown)
    algebra = algebra_for(reader.logic.bounds, visible)
    mask = algebra.mask(visible)
    if mask is None or mask.operand_names() or not shown or len(fills) > 1:
        return None
    is_single = algebra.bounds.counts[QUERY] == 1
    split = [_split(reader.logic, when, terms, 0 if is_single else QUERY) for when, terms in shown]
    form = split[0][1]
    if any(other != form for _, other in split):
        return None
    slopes = {slope: when for (slope, _), (when, _) in zip(split, shown, strict=True)}
    offset = None if form.offset is None else algebra.length(form.offset)
    if form.symmetric and offset is None:
        return None
    factors = (*find_slopes(reader, slopes), *find_slopes(reader, {form.times: TRUE}))
    exact = offset is not None and not form.rest
    return Line(factors, offset, form.symmetric, exact, mask, *fills)


def _fill(terms: Terms) -> float | None:
    """The number that hides a key: -inf, or a finite one that absorbs whatever it is added to."""
    numbers = [
        float(factor * expr) if isinstance(factor, sympy.Expr) else float(factor)
        for factor, expr in terms.items()
        if is_constant(factor) and is_constant(expr)
    ]
    return next((number for number in numbers if number <= ABSORBING), None)


def _split(logic: Logic, when: Formula, terms: Terms, query: sympy.Expr | int) -> tuple[Number, Form]:
    """The one factor that multiplies the key's position, and how; the rest may be no more than a row's own."""
    along = {factor: _decided(logic, when, expr) for factor, expr in terms.items()}
    rest = {factor: expr for factor, expr in along.items() if not expr.has(KEY)}
    if len(along) != len(rest) + 1:
        raise NotUnderstood
    ((slope, expr),) = ((factor, expr) for factor, expr in along.items() if factor not in rest)
    form = _form(expr.subs(QUERY, query), query)
    return slope, Form(form.times, form.offset, form.symmetric, (*form.rest, *rest.items()))


def _decided(logic: Logic, condition: Formula, expr: sympy.Expr) -> sympy.Expr:
    """|x| is x, or -x, where the condition decides which."""
    for inner in expr.atoms(sympy.Abs):
        for value in (inner.args[0], -inner.args[0]):
            if logic.given(parts_of(condition), logic.at_most_zero(-value)) == TRUE:
                expr = expr.subs(inner, value)
                break
    return sympy.expand(expr)


def _form(expr: sympy.Expr, query: sympy.Expr | int) -> Form:
    magnitudes = expr.atoms(sympy.Abs)
    if magnitudes:
        return _symmetric(expr, *magnitudes, query=query)
    times = expr.coeff(KEY, 1)
    rest = sympy.expand(expr - times * KEY)
    if rest.has(KEY) or not is_same_everywhere(times):
        raise NotUnderstood
    offset = sympy.cancel(-rest / times) - query
    if offset.has(QUERY) or not offset.is_integer:
        return Form(times, None, rest=((ONE, rest),))
    return Form(times, sympy.expand(offset))


def _symmetric(expr: sympy.Expr, inner: sympy.Expr, *others: sympy.Expr, query: sympy.Expr | int) -> Form:
    times, (distance,) = expr.coeff(inner, 1), inner.args
    rest = sympy.expand(expr - times * inner)
    distance = sympy.expand(distance * distance.coeff(KEY, 1))
    offset = sympy.expand(KEY - query - distance)
    if others or rest.has(KEY) or offset.has(KEY, QUERY) or not is_same_everywhere(times):
        raise NotUnderstood
    return Form(-times, offset, symmetric=True, rest=() if rest == 0 else ((ONE, rest),))
