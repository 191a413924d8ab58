"""Sums of products of positions and slopes, taken apart: what multiplies which integers, and by which tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import sympy

from attnopt.passes.linear_coefficient import Source, source_at
from attnopt.passes.mask_algebra import KEY, QUERY
from attnopt.passes.mask_formula import FALSE, TRUE, Call, Formula, NotUnderstood, Number, negate
from attnopt.passes.mask_numbers import is_constant, reads
from attnopt.passes.mask_reader import MaskReader

ONE = sympy.Integer(1)

#: factor * expression, added up: factors do not depend on query and key, expressions are integers.
Terms = Mapping[Number, sympy.Expr]


@dataclass(frozen=True, slots=True)
class Factor:
    """A number, or the elements of a tensor of the graph that has at most the roles b and h; `inverse`: divided by."""

    value: float = 1.0
    source: Source | None = None
    inverse: bool = False


def terms_of(leaf: Number) -> Terms:
    """A number as a sum of products. Raises NotUnderstood where it depends on query or key in another way."""
    match leaf:
        case sympy.Expr():
            return {ONE: leaf}
        case Call("neg", (argument,)):
            return _scaled(-ONE, terms_of(argument))
        case Call("add", (left, right)):
            return _sum(terms_of(left), terms_of(right))
        case Call("sub", (left, right)):
            return _sum(terms_of(left), _scaled(-ONE, terms_of(right)))
        case Call("mul", (left, right)) if is_same_everywhere(left):
            return _scaled(left, terms_of(right))
        case Call("mul", (left, right)) if is_same_everywhere(right):
            return _scaled(right, terms_of(left))
        case Call("div", (left, right)) if is_same_everywhere(right):
            return _scaled(_inverse(right), terms_of(left))
    if not is_same_everywhere(leaf):
        raise NotUnderstood
    return {leaf: ONE}


def is_same_everywhere(leaf: Number) -> bool:
    """Whether a number is the same for all queries and keys."""
    return not (reads(leaf, QUERY) or reads(leaf, KEY))


def _inverse(of: Number) -> Number:
    return 1 / float(of) if is_constant(of) and of else Call("div", (ONE, of))


def _sum(left: Terms, right: Terms) -> Terms:
    total = {factor: sympy.expand(left.get(factor, 0) + right.get(factor, 0)) for factor in {**left, **right}}
    return {factor: expr for factor, expr in total.items() if expr != 0}


def _scaled(by: Number, terms: Terms) -> Terms:
    if isinstance(by, sympy.Expr):
        return {factor: sympy.expand(by * expr) for factor, expr in terms.items()}
    return {(by if factor == ONE else Call("mul", (by, factor))): expr for factor, expr in terms.items()}


def find_slopes(reader: MaskReader, slopes: Mapping[Number, Formula]) -> tuple[Factor, ...]:
    """The slope as a product of tensors of the graph; of several, each holds under its own condition on heads.

    Raises NotUnderstood where the graph has no such tensors.
    """
    if len(slopes) == 1:
        return tuple(_factors(reader, *slopes))
    source = _find_cases(reader, slopes)
    if source is not None:
        return (Factor(source=source),)
    common, inner = _without_common(slopes)
    return (*_factors(reader, common), *find_slopes(reader, inner))


def _factors(reader: MaskReader, number: Number) -> Iterator[Factor]:
    if is_constant(number):
        yield Factor(float(number))
        return
    found = _find_cases(reader, {number: TRUE})
    match number:
        case _ if found is not None:
            yield Factor(source=found)
        case Call("neg", (argument,)):
            yield from (Factor(-1.0), *_factors(reader, argument))
        case Call("mul", (left, right)):
            yield from (*_factors(reader, left), *_factors(reader, right))
        case Call("div", (left, right)):
            yield from (*_factors(reader, left), *map(_inverted, _factors(reader, right)))
        case sympy.Expr() if number.could_extract_minus_sign():
            yield from (Factor(-1.0), *_factors(reader, -number))
        case _:
            raise NotUnderstood


def _inverted(factor: Factor) -> Factor:
    if factor.source is None:
        return Factor(1 / factor.value)
    return Factor(source=factor.source, inverse=not factor.inverse)


def _find_cases(reader: MaskReader, slopes: Mapping[Number, Formula]) -> Source | None:
    """A tensor that holds each of the numbers wherever its condition holds; of several, the one that is made last."""
    logic = reader.logic
    for (node, index), held in reversed(list(reader.reached().items())):
        if isinstance(held, Formula) or not slopes.keys() <= held.keys():
            continue
        if all(logic.conj([when, negate(held[slope])]) == FALSE for slope, when in slopes.items()):
            found = source_at(reader, node, index, "bh")
            if found is not None:
                return found
    return None


def _without_common(slopes: Mapping[Number, Formula]) -> tuple[Number, Mapping[Number, Formula]]:
    """What multiplies all of them, and the rest of each."""
    first, *others = slopes
    for common, rest in _products(first):
        rests = [next((r for c, r in _products(other) if c == common), None) for other in others]
        if None not in rests:
            return common, dict(zip([rest, *rests], slopes.values(), strict=True))
    raise NotUnderstood


def _products(number: Number) -> Iterator[tuple[Number, Number]]:
    """Each way to see a number as a product."""
    match number:
        case Call("neg", (argument,)):
            yield -ONE, argument
        case Call("mul", (left, right)):
            yield left, right
            yield right, left
        case Call("div", (left, right)):
            yield Call("div", (ONE, right)), left
