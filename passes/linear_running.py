"""Running sums of log decays: cumsum of data as a number of the mask calculus, also under a triangle (`segsum`).

A running sum under a triangle, sum over p with j < p <= i of x[p], is the difference of two running sums: that of the
Mamba-2 reference (Dao and Gu 2024, arXiv:2405.21060, listing 1), which avoids the difference itself.
"""

import sympy

from attnopt.passes.mask_formula import AtMostZero, Call, Formula, NotUnderstood, Number, always
from attnopt.passes.mask_numbers import compute, moved
from attnopt.passes.mask_reader import At, Value, as_numbers
from attnopt.passes.mask_rules import RULES
from attnopt.passes.sizes import shape_of

ZERO = sympy.Integer(0)


def running_sum(at: At) -> Value:
    """The element of a cumsum: Call("running", x[i]) stands for x[0] + ... + x[i]."""
    try:
        return RULES["cumsum"](at)
    except NotUnderstood:
        return _of_data(at)


def running_product(at: At) -> Value:
    """The element of a cumprod of data: the exponential of a running sum of logarithms, for positive numbers."""
    return at.logic.lift(
        lambda leaf: Call("exp", (_in_logarithms(leaf),)), as_numbers(at.logic, _of_data(at))
    )


def _in_logarithms(leaf: Number) -> Number:
    match leaf:
        case Call("running", (Call("exp", (term,)),)):
            return Call("running", (term,))
        case Call("running", (term,)):
            return Call("running", (Call("log", (term,)),))
    raise NotUnderstood


def _of_data(at: At) -> Value:
    source = at.args["self"]
    dim = at.args["dim"] % len(at.index)
    along = sympy.Symbol(f"{at.node.name}.position", integer=True, nonnegative=True)
    index = (*at.index[:dim], along, *at.index[dim + 1 :])
    reader = at.reader.with_position(along, shape_of(source)[dim])
    cases = as_numbers(reader.logic, reader.element_at(source, index, at.node))
    at.value(source, at.index)  # so that the terms are known by their place in the graph
    terms = [leaf for leaf in cases if leaf != ZERO]
    if len(terms) != 1:
        raise NotUnderstood
    (term,) = terms
    end = at.index[dim]
    if ZERO not in cases:
        return always(_up_to(term, along, end))
    start = _start(cases[term], along, at)
    whole = compute("sub", _up_to(term, along, end), _up_to(term, along, start - 1))
    # The difference is also right, namely 0, where the last position that does not count is the end itself.
    return at.logic.select(at.logic.at_most_zero(start - 1 - end), always(whole), always(ZERO))


def _up_to(term: Number, along: sympy.Symbol, end: sympy.Expr) -> Number:
    """x[0] + ... + x[end]."""
    if _has(term, along):
        return Call("running", (moved(term, along, end),))
    return compute("mul", term, end + 1)


def _start(condition: Formula, along: sympy.Symbol, at: At) -> sympy.Expr:
    """The first position that counts, where those that count are all from one behind a position on."""
    match condition:
        case AtMostZero(expr) if sympy.expand(expr + along - 1) in at.index:
            return sympy.expand(expr + along)
    raise NotUnderstood


def _has(number: Number, symbol: sympy.Symbol) -> bool:
    return moved(number, symbol, symbol + 1) != number
