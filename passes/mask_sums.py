"""Numbers of a formula as sums of products: factors, each times integers of the positions."""

from collections.abc import Mapping

import sympy

from attnopt.passes.mask_algebra import KEY, QUERY
from attnopt.passes.mask_formula import Call, Number
from attnopt.passes.mask_numbers import is_constant, reads

ONE = sympy.Integer(1)

#: factor * expression, added up; expressions are integers.
Terms = Mapping[Number, sympy.Expr]


def terms_of(leaf: Number) -> Terms:
    """A number as a sum of products; what is not understood is a factor as a whole, times 1."""
    match leaf:
        case sympy.Expr():
            return {ONE: leaf}
        case Call("neg", (argument,)):
            return scaled(-ONE, terms_of(argument))
        case Call("add", (left, right)):
            return added(terms_of(left), terms_of(right))
        case Call("sub", (left, right)):
            return added(terms_of(left), scaled(-ONE, terms_of(right)))
        case Call("mul", (left, right)) if is_same_everywhere(left):
            return scaled(left, terms_of(right))
        case Call("mul", (left, right)) if is_same_everywhere(right):
            return scaled(right, terms_of(left))
        case Call("div", (left, right)) if is_same_everywhere(right):
            return scaled(_inverse(right), terms_of(left))
    return {leaf: ONE}


def is_same_everywhere(leaf: Number) -> bool:
    """Whether a number is the same for all queries and keys."""
    return not (reads(leaf, QUERY) or reads(leaf, KEY))


def added(left: Terms, right: Terms) -> Terms:
    """The sum; what cancels is left out."""
    total = {factor: sympy.expand(left.get(factor, 0) + right.get(factor, 0)) for factor in {**left, **right}}
    return {factor: expr for factor, expr in total.items() if expr != 0}


def scaled(by: Number, terms: Terms) -> Terms:
    """The product with one number."""
    if isinstance(by, sympy.Expr):
        return {factor: sympy.expand(by * expr) for factor, expr in terms.items()}
    return {(by if factor == ONE else Call("mul", (by, factor))): expr for factor, expr in terms.items()}


def _inverse(of: Number) -> Number:
    return 1 / float(of) if is_constant(of) and of else Call("div", (ONE, of))
