"""From proven conditions to the mask algebra; and whether, under a mask, some query may see no key."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import sympy

from attnopt.mask import (
    BOTTOM_RIGHT,
    FULL,
    TOP_LEFT,
    And,
    Causal,
    First,
    Full,
    Length,
    Mask,
    Or,
    Window,
)
from attnopt.mask_blocks import Chunk, Segments
from attnopt.passes.mask_bounds import POSITIONS, Bounds
from attnopt.passes.mask_chunks import ChunkLine, chunk_line
from attnopt.passes.mask_formula import FALSE, All, AtMostZero, Formula, Some
from attnopt.passes.sizes import Size

BATCH, HEAD, QUERY, KEY = (POSITIONS["b"], POSITIONS["h"], POSITIONS["i"], POSITIONS["j"])

#: Lengths are sought with these factors of Sq and Sk, simplest first.
FACTORS = sorted(product((0, 1, -1, 2, -2), repeat=2), key=lambda pair: (sum(map(abs, pair)), pair))

#: No key at all.
NOTHING = First(0)


@dataclass(frozen=True, slots=True)
class Algebra:
    """Names conditions for one site.

    bounds: know Sq and Sk. diagonal: where the site's causal mask ends, j <= i + diagonal; windows count from it.
    """

    bounds: Bounds
    diagonal: sympy.Expr

    def mask(self, formula: Formula) -> Mask | None:
        """The formula in the algebra, or None where some part of it has no name there."""
        if formula == FALSE:
            return NOTHING
        match formula:
            case AtMostZero(expr):
                return self._line(expr)
            case All(parts):
                masks = [self.mask(part) for part in parts]
                return None if None in masks else all_of(masks)
            case Some(parts):
                masks = [self.mask(part) for part in parts]
                return None if None in masks else some_of(masks)
        return None

    def _line(self, expr: sympy.Expr) -> Mask | None:
        """expr <= 0 for a straight line through the positions: a diagonal, or a column."""
        expr = self._without_single_positions(expr)
        chunked = chunk_line(expr)
        if chunked is not None:
            return self._chunk(chunked)
        slope_i, slope_j = expr.coeff(QUERY, 1), expr.coeff(KEY, 1)
        rest = sympy.expand(expr - slope_i * QUERY - slope_j * KEY)
        if rest.has(*self.bounds.counts):
            return None
        if slope_i == 0 and slope_j == -1 and self._is_single_query():
            slope_i = sympy.Integer(1)
        match int(slope_i) if slope_i.is_Integer else None, int(slope_j) if slope_j.is_Integer else None:
            case -1, 1:
                offset = self.length(-rest)
                return None if offset is None else Causal(offset)
            case 1, -1:
                return self._window(rest)
            case 0, 1 if rest.is_Integer:
                return First(max(int(1 - rest), 0))
        return None

    def _chunk(self, line: ChunkLine) -> Mask | None:
        query, key = self.length(line.query), self.length(line.key)
        return None if query is None or key is None else Chunk(line.size, query, key, line.side)

    def _window(self, rest: sympy.Expr) -> Mask | None:
        """j >= i + rest, counted from the causal diagonal if that gives a whole number."""
        width = sympy.expand(self.diagonal - rest + 1)
        if width.is_Integer:
            offset = self.length(self.diagonal)
            return None if offset is None else Window(int(width), offset)
        start = self.length(rest - 1)
        return None if start is None else Window(-start.const, Length(0, start.sq, start.sk))

    def length(self, expr: sympy.Expr) -> Length | None:
        """`expr` as a length, named by an alignment where it is one."""
        sq, sk = self.bounds.counts[QUERY], self.bounds.counts[KEY]
        expr = sympy.expand(expr)
        if expr == 0:
            return TOP_LEFT
        if sympy.expand(expr - (sk - sq)) == 0:
            return BOTTOM_RIGHT
        for a, b in FACTORS:
            const = sympy.expand(expr - a * sq - b * sk)
            if const.is_Integer:
                return Length(int(const), a, b)
        return None

    def _without_single_positions(self, expr: sympy.Expr) -> sympy.Expr:
        return expr.subs({p: 0 for p in (BATCH, HEAD) if self.bounds.counts[p] == 1})

    def _is_single_query(self) -> bool:
        return bool(self.bounds.counts[QUERY] == 1)


def algebra_for(bounds: Bounds, formula: Formula) -> Algebra:
    """The algebra whose diagonal is that of the formula; without one, that which ends at the last key."""
    ends = sympy.expand(bounds.counts[KEY] - bounds.counts[QUERY])
    diagonals = {
        sympy.expand(KEY - QUERY - expr)
        for expr in _lines(formula)
        if (expr.coeff(QUERY, 1), expr.coeff(KEY, 1)) == (-1, 1)
    }
    return Algebra(bounds, diagonals.pop() if len(diagonals) == 1 else ends)


def _lines(formula: Formula) -> Iterator[sympy.Expr]:
    if isinstance(formula, AtMostZero):
        yield formula.expr
    if isinstance(formula, All | Some):
        for part in formula.parts:
            yield from _lines(part)


def all_of(masks: Iterable[Mask | None]) -> Mask:
    """Their conjunction, in a fixed order; what says "no earlier" and "no later chunk" says "the same chunk"."""
    kept = sorted((m for m in masks if m is not None), key=str)
    bounded = [m for m in kept if isinstance(m, Chunk) and m.side != "same"]
    together = {replace(m, side="same") for m in bounded if m.side == "since" and _ends_with(m, kept)}
    result: Mask = FULL
    for mask in kept:
        result = (
            result & mask if mask not in bounded or replace(mask, side="same") not in together else result
        )
    for mask in together:
        result = result & mask
    return result


def _ends_with(since: Chunk, others: Iterable[Mask]) -> bool:
    """Whether the others hide later chunks: a causal mask does that ends within the query's own."""
    diagonal = Causal(_minus(since.query, since.key))
    return any(other in (diagonal, replace(since, side="until")) for other in others)


def _minus(a: Length, b: Length) -> Length:
    return Length(a.const - b.const, a.sq - b.sq, a.sk - b.sk)


def some_of(masks: Iterable[Mask | None]) -> Mask:
    """Their disjunction, in a fixed order."""
    first, *others = sorted((m for m in masks if m is not None), key=str)
    for mask in others:
        first = first | mask
    return first


def with_implied_diagonal(algebra: Algebra, mask: Mask) -> Mask:
    """Adds the causal mask that a window counts from where it hides nothing: kernels bound a window on both sides."""
    parts = mask.parts if isinstance(mask, And) else (mask,)
    windows = [w for part in parts for w in _alternatives(part) if isinstance(w, Window)]
    if not windows or any(isinstance(part, Causal) for part in parts):
        return mask
    offset = windows[0].offset
    sizes = algebra.bounds.counts[QUERY], algebra.bounds.counts[KEY]
    certain = algebra.bounds.always_at_most_zero(KEY - QUERY - _at(offset, *sizes))
    return mask & Causal(offset) if certain else mask


def _alternatives(mask: Mask) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, Or) else (mask,)


def _at(length: Length, sq: sympy.Expr, sk: sympy.Expr) -> sympy.Expr:
    return length.const + length.sq * sq + length.sk * sk


def may_have_empty_rows(mask: Mask, sq: Size, sk: Size) -> bool:
    """Whether some query might see no key; False only where each certainly sees one.

    sq, sk: numbers, or expressions whose symbols stand for sizes.
    """
    bounds = Bounds({QUERY: sympy.sympify(sq), KEY: sympy.sympify(sk)})
    return not any(
        _always_sees(parts, bounds)
        or any(_sees_at(shift, parts, bounds) for shift in (TOP_LEFT, BOTTOM_RIGHT))
        for parts in _choices(mask)
    )


def _choices(mask: Mask) -> Iterator[tuple[Mask, ...]]:
    """Conjunctions of plain masks, each of which implies `mask`."""
    match mask:
        case And(parts):
            for chosen in product(*map(_choices, parts)):
                yield tuple(m for conjunction in chosen for m in conjunction)
        case Or(parts):
            for part in parts:
                yield from _choices(part)
        case _:
            yield (mask,)


def _always_sees(parts: tuple[Mask, ...], bounds: Bounds) -> bool:
    """Each part bounds the visible keys of query i from one side: every lower bound must be within every upper one."""
    sq, sk = bounds.counts[QUERY], bounds.counts[KEY]
    lowest, highest = [sympy.Integer(0)], [sk - 1]
    for part in parts:
        match part:
            case Full():
                continue
            case Causal(offset):
                highest.append(QUERY + _at(offset, sq, sk))
            case Window(width, offset):
                lowest.append(QUERY + _at(offset, sq, sk) - width + 1)
            case First(count):
                highest.append(sympy.Integer(count - 1))
            case _:
                return False
    return all(bounds.always_at_most_zero(low - high) for low, high in product(lowest, highest))


def _sees_at(shift: Length, parts: tuple[Mask, ...], bounds: Bounds) -> bool:
    """Whether query i certainly sees key i + shift."""
    sq, sk = bounds.counts[QUERY], bounds.counts[KEY]
    key = QUERY + _at(shift, sq, sk)
    needed = [-key, key - sk + 1]
    for part in parts:
        match part:
            case Full():
                continue
            case Causal(offset):
                needed.append(_at(_minus(shift, offset), sq, sk))
            case Window(width, offset):
                needed.append(_at(_minus(offset, shift), sq, sk) - width + 1)
            case Chunk(_, at_query, at_key) if at_query == Length(
                shift.const + at_key.const, shift.sq + at_key.sq, shift.sk + at_key.sk
            ):
                continue
            case Segments(aligned=True) if shift == TOP_LEFT:
                continue
            case _:
                return False
    return all(bounds.always_at_most_zero(expr) for expr in needed)
