"""From proven conditions to the mask algebra; and whether, under a mask, some query may see no key."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import sympy

from attnopt.mask import BOTTOM_RIGHT, FULL, TOP_LEFT, And, Causal, First, Full, Length, Mask, Or, Window
from attnopt.passes.mask_bounds import POSITIONS, Bounds
from attnopt.passes.mask_formula import FALSE, All, AtMostZero, Formula, Some
from attnopt.passes.sizes import Size

BATCH, HEAD, QUERY, KEY = (POSITIONS[role] for role in ("b", "h", "i", "j"))

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
                return None if None in masks else _joined(masks, together=True)
            case Some(parts):
                masks = [self.mask(part) for part in parts]
                return None if None in masks else _joined(masks, together=False)
        return None

    def _line(self, expr: sympy.Expr) -> Mask | None:
        """expr <= 0 for a straight line through the positions: a diagonal, or a column."""
        expr = self._without_single_positions(expr)
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


def _joined(masks: list[Mask | None], *, together: bool) -> Mask:
    kept = sorted((m for m in masks if m is not None), key=str)
    result = kept[0] if kept else FULL
    for mask in kept[1:]:
        result = result & mask if together else result | mask
    return result


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
    return not any(_always_sees(parts, bounds) for parts in _choices(mask))


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
