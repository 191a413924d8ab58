"""Sums of products of positions and slopes, taken apart: what multiplies which integers, and by which tensors."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import sympy

from attnopt.passes.linear_coefficient import Source, source_at
from attnopt.passes.mask_formula import FALSE, TRUE, Call, Formula, NotUnderstood, Number, negate
from attnopt.passes.mask_numbers import is_constant
from attnopt.passes.mask_reader import MaskReader
from attnopt.passes.mask_sums import ONE, Terms, is_same_everywhere, terms_of


@dataclass(frozen=True, slots=True)
class Factor:
    """A number, or the elements of a tensor of the graph that has at most the roles b and h; `inverse`: divided by."""

    value: float = 1.0
    source: Source | None = None
    inverse: bool = False


def steady_terms(leaf: Number) -> Terms:
    """A number as a sum of products whose factors do not depend on query and key, or raises NotUnderstood."""
    terms = terms_of(leaf)
    if not all(is_same_everywhere(factor) for factor in terms):
        raise NotUnderstood
    return terms


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
