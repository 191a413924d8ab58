"""Integers over positions and sizes (sympy expressions), and bounds of them that hold for every position and size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Any, Literal

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from attnopt.passes.sizes import Size

#: What a position counts: batch, head, query, key; x and y: a part of these, or several at once.
Role = Literal["b", "h", "i", "j", "x", "y"]

#: The symbol of each position; each runs from 0 to its size - 1.
POSITIONS: Mapping[Role, sympy.Symbol] = {
    role: sympy.Symbol(role, integer=True, nonnegative=True) for role in ("b", "h", "i", "j", "x", "y")
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """Bounds of integer expressions.

    counts: position symbol -> how many values it takes, from 0 on. symbols: size symbol -> its range, as guarded by
    whoever traced the graph; a symbol that is not there has the range that its sympy assumptions give.
    """

    counts: Mapping[sympy.Symbol, sympy.Expr]
    symbols: Mapping[sympy.Symbol, ValueRanges[Any]] = field(default_factory=dict)
    known: dict[sympy.Expr, float] = field(default_factory=dict, compare=False, repr=False)

    def with_position(self, symbol: sympy.Symbol, count: Size) -> "Bounds":
        """The same, and one more position."""
        return Bounds({**self.counts, symbol: sympy.sympify(count)}, self.symbols)

    def upper(self, expr: sympy.Expr) -> float:
        """A number, perhaps infinite, that `expr` never exceeds.

        Each position is set to the end of its range that makes its term largest, before sizes are bounded: so
        i - Sq is seen to be below 0 whatever Sq.
        """
        if expr not in self.known:
            self.known[expr] = self._upper(expr)
        return self.known[expr]

    def _upper(self, expr: sympy.Expr) -> float:
        factors = dict(sympy.expand(expr).as_coefficients_dict())
        for symbol, count in self.counts.items():
            slope = factors.get(symbol)
            if slope is None or any(term is not symbol and term.has(symbol) for term in factors):
                continue
            del factors[symbol]
            if slope > 0:
                for term, factor in (count - 1).as_coefficients_dict().items():
                    factors[term] = factors.get(term, 0) + slope * factor
        return sum((self._upper_of(term, factor) for term, factor in factors.items() if factor), start=0)

    def lower(self, expr: sympy.Expr) -> float:
        """A number, perhaps minus infinity, that `expr` never falls below."""
        return -self.upper(-expr)

    def always_at_most_zero(self, expr: sympy.Expr) -> bool:
        """Whether expr <= 0 is certain."""
        return self.upper(expr) <= 0

    def _upper_of(self, term: sympy.Expr, factor: sympy.Number) -> float:
        """Of factor * term."""
        if not factor.is_Integer:
            return math.inf
        if term.is_Integer:
            return int(factor) * int(term)
        held = self._held(term)
        bound = held.upper if factor > 0 else held.lower
        return int(factor) * int(bound) if getattr(bound, "is_Integer", False) else math.inf

    def _held(self, term: sympy.Expr) -> ValueRanges[Any]:
        if term in self.symbols:
            return self.symbols[term]
        ranges = {**self.symbols, **{s: self._range(s) for s in term.free_symbols & self.counts.keys()}}
        return bound_sympy(term, ranges)

    def _range(self, symbol: sympy.Symbol) -> ValueRanges[Any]:
        last = self.upper(self.counts[symbol] - 1)
        return ValueRanges(0, int_oo if math.isinf(last) else max(int(last), 0))


def bounds_for(node: Node, sizes: Mapping[Role, Size]) -> Bounds:
    """Bounds for a mask at `node`, for positions that run over the given sizes."""
    counts = {POSITIONS[role]: sympy.sympify(size) for role, size in sizes.items()}
    value = node.meta.get("val")
    mode = getattr(value, "fake_mode", None) if isinstance(value, Tensor) else None
    env = getattr(mode, "shape_env", None)
    return Bounds(counts, dict(getattr(env, "var_to_range", {})))


def guarded(env: Any) -> list[sympy.Expr]:
    """Expressions over symbolic sizes that the guards of a graph keep at 0 or below."""
    guards = (sympy.And.make_args(guard.expr) for guard in getattr(env, "guards", ()))
    found = [
        part
        for parts in guards
        for part in parts
        if isinstance(part, sympy.Le | sympy.Lt | sympy.Ge | sympy.Gt)
    ]
    return [sympy.expand(part.lts - part.gts + int(isinstance(part, sympy.Lt | sympy.Gt))) for part in found]


def integer_of(value: Any) -> sympy.Expr | None:
    """A Python int, a SymInt, or a node that holds one, as an expression; None for anything else."""
    if isinstance(value, Node):
        value = value.meta.get("val")
    if isinstance(value, torch.SymInt):
        return sympy.sympify(value.node.expr)
    return sympy.Integer(value) if isinstance(value, int) and not isinstance(value, bool) else None


def reduced(expr: sympy.Expr) -> sympy.Expr:
    """Without common factors: 2j - 2i - 1 <= 0 is, for integers, j - i <= 0."""
    constant, terms = expr.as_coeff_Add()
    factors = [
        int(term.as_coeff_Mul()[0])
        for term in sympy.Add.make_args(terms)
        if term.as_coeff_Mul()[0].is_Integer
    ]
    common = gcd(*factors) if len(factors) == len(sympy.Add.make_args(terms)) else 1
    if common in (0, 1):
        return expr
    return sympy.expand(terms / common) - sympy.floor(sympy.Rational(-constant, common))
