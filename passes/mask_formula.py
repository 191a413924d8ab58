"""Conditions on positions, and values that depend on them: kept in a normal form by what the bounds can decide.

A formula is a literal (an integer expression is at most 0; or a fact that only data tell), or all, or some, of
other formulas. A value is a finite set of cases: leaf -> when it has that leaf; exactly one case holds anywhere.
"""

from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations, product
from typing import TypeAlias

import sympy
from torch.fx import Node

from attnopt.passes.mask_bounds import Bounds, reduced

#: Where in a tensor: one expression a dimension.
Index = tuple[sympy.Expr, ...]

#: More parts or cases than any mask that people write; what has more stays data.
MAX_PARTS = 16
MAX_CALLS = 64  # operations in a number that is left as it is


class NotUnderstood(Exception):  # noqa: N818 - never reaches anybody: the tensor stays data
    """The calculus has no rule for this."""


@dataclass(frozen=True)
class Data:
    """The element of a tensor at an index, about which nothing is known."""

    node: Node
    index: Index


@dataclass(frozen=True)
class Call:
    """A number that is computed from others, left as it is: `op` names the operation."""

    op: str
    args: "tuple[Number, ...]"
    size: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        size = 1 + sum(arg.size for arg in self.args if isinstance(arg, Call))
        if size > MAX_CALLS:  # a value that is used again and again doubles it each time
            raise NotUnderstood
        object.__setattr__(self, "size", size)


#: An integer expression, a number that is no integer (or infinite), or something opaque.
Number: TypeAlias = sympy.Expr | float | Data | Call


class Formula:
    """A condition on positions."""


@dataclass(frozen=True)
class AtMostZero(Formula):
    """expr <= 0."""

    expr: sympy.Expr


@dataclass(frozen=True)
class Fact(Formula):
    """The element of a boolean tensor, or its negation."""

    data: Data
    holds: bool = True


@dataclass(frozen=True)
class Same(Formula):
    """A whole number of the query equals one of the key, and only data tell whether; not `holds`: they differ."""

    query: Number
    key: Number
    holds: bool = True


@dataclass(frozen=True)
class Lag(Formula):
    """first - second + by <= 0, for two elements of one tensor of whole numbers."""

    first: Data
    second: Data
    by: int


@dataclass(frozen=True, eq=False)
class Combination(Formula):
    """Parts in the order in which they were found; equal to another one with the same parts."""

    parts: tuple[Formula, ...]

    @cached_property
    def members(self) -> frozenset[Formula]:
        return frozenset(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Combination) and type(other) is type(self) and self.members == other.members

    def __hash__(self) -> int:
        return hash((type(self), self.members))


@dataclass(frozen=True, eq=False)
class All(Combination):
    """Every part holds."""


@dataclass(frozen=True, eq=False)
class Some(Combination):
    """Some part holds."""


Cases = Mapping[Number, Formula]

TRUE = All(())
FALSE = Some(())


def always(leaf: Number) -> Cases:
    """The value that is `leaf` everywhere."""
    return {leaf: TRUE}


def parts_of(formula: Formula) -> tuple[Formula, ...]:
    """The conjuncts of a formula."""
    return formula.parts if isinstance(formula, All) else (formula,)


def negate(formula: Formula) -> Formula:
    """The formula that holds exactly where this one does not."""
    match formula:
        case AtMostZero(expr):
            return AtMostZero(1 - expr)
        case Fact(data, holds):
            return Fact(data, holds=not holds)
        case Same(query, key, holds):
            return Same(query, key, holds=not holds)
        case Lag(first, second, by):
            return Lag(second, first, 1 - by)
        case All(parts):
            return Some(tuple(map(negate, parts)))
        case Some(parts):
            return All(tuple(map(negate, parts)))
    raise TypeError(f"{formula} is no formula of the mask calculus")


@dataclass(frozen=True)
class Logic:
    """Builds formulas and cases in normal form; `bounds` decide what holds at every position."""

    bounds: Bounds

    def at_most_zero(self, expr: sympy.Expr) -> Formula:
        """expr <= 0; |e|, max and min in it become conditions on what is inside them."""
        expr = sympy.expand(expr)
        inner = next((t for t in sympy.Add.make_args(expr) if t.has(sympy.Abs, sympy.Max, sympy.Min)), None)
        if inner is not None:
            return self._by_alternatives(inner, expr - inner)
        if self.bounds.upper(expr) <= 0:
            return TRUE
        if self.bounds.lower(expr) > 0:
            return FALSE
        return AtMostZero(reduced(expr))

    def _by_alternatives(self, term: sympy.Expr, rest: sympy.Expr) -> Formula:
        """factor * max(a, b, ...) + rest <= 0: for all of them if the factor is positive, else for some."""
        factor, inner = term.as_coeff_Mul()
        if isinstance(inner, sympy.Abs):
            choices, largest = (inner.args[0], -inner.args[0]), True
        elif isinstance(inner, sympy.Max | sympy.Min):
            choices, largest = inner.args, isinstance(inner, sympy.Max)
        else:
            raise NotUnderstood
        conditions = [self.at_most_zero(factor * choice + rest) for choice in choices]
        return self.conj(conditions) if largest == (factor > 0) else self.disj(conditions)

    def equal(self, a: sympy.Expr, b: sympy.Expr) -> Formula:
        """a == b."""
        return self.conj([self.at_most_zero(a - b), self.at_most_zero(b - a)])

    def implies(self, p: Formula, q: Formula) -> bool:
        """Whether literal q certainly holds where literal p does."""
        if p == q:
            return True
        if isinstance(p, AtMostZero) and isinstance(q, AtMostZero):
            return self.bounds.always_at_most_zero(q.expr - p.expr)
        if isinstance(p, Lag) and isinstance(q, Lag):
            return (p.first, p.second) == (q.first, q.second) and q.by <= p.by
        return False

    def conj(self, formulas: Iterable[Formula]) -> Formula:
        """All of `formulas`, without parts that follow from others; FALSE where two contradict each other."""
        parts = list(dict.fromkeys(p for formula in formulas for p in parts_of(formula)))
        _require_few(parts)
        if FALSE in parts:
            return FALSE
        known = self._strongest([p for p in parts if not isinstance(p, Combination)])
        if any(self.implies(p, negate(q)) for p, q in product(known, known)):
            return FALSE
        compound = [p for p in parts if isinstance(p, Some)]
        simpler = [self.given(known, p) for p in compound]
        if simpler == compound:
            simpler = self._resolved(compound)
        if simpler != compound:
            return self.conj([*known, *simpler])
        kept = [p for p in compound if not any(q.members < p.members for q in compound)]
        return _all([*known, *kept])

    def _resolved(self, parts: list[Some]) -> list[Formula]:
        """(a or x) and (a or not x) is a."""
        for p, q in combinations(parts, 2):
            only_p, only_q = p.members - q.members, q.members - p.members
            if len(only_p) == 1 and {negate(x) for x in only_p} == only_q:
                common = self.disj(x for x in p.parts if x not in only_p)
                return [r for r in parts if r not in (p, q)] + [common]
        return list(parts)

    def disj(self, formulas: Iterable[Formula]) -> Formula:
        """Some of `formulas`, simplified; what all alternatives share is taken out."""
        found = negate(self.conj(negate(formula) for formula in formulas))
        if not isinstance(found, Some) or len(found.parts) < 2:
            return found
        first, *others = map(parts_of, found.parts)
        shared = [p for p in first if all(p in other for other in others)]
        if not shared:
            return found
        rest = [_all(p for p in parts if p not in shared) for parts in (first, *others)]
        return self.conj([*shared, self.disj(rest)])

    def _strongest(self, literals: list[Formula]) -> list[Formula]:
        kept: list[Formula] = []
        for p in literals:
            if not any(self.implies(q, p) for q in kept):
                kept = [*(q for q in kept if not self.implies(p, q)), p]
        return kept

    def given(self, known: Iterable[Formula], formula: Formula) -> Formula:
        """`formula` where the `known` literals hold."""
        known = list(known)
        match formula:
            case All(parts):
                return self.conj(self.given(known, p) for p in parts)
            case Some(parts):
                return self.disj(self.given(known, p) for p in parts)
        if any(self.implies(k, formula) for k in known):
            return TRUE
        return FALSE if any(self.implies(k, negate(formula)) for k in known) else formula

    def cases(self, pairs: Iterable[tuple[Number, Formula]]) -> Cases:
        """Cases from (leaf, condition) pairs that are exclusive and leave nothing out."""
        conditions: dict[Number, list[Formula]] = {}
        for leaf, condition in pairs:
            if condition != FALSE:
                conditions.setdefault(leaf, []).append(condition)
        _require_few(conditions)
        if len(conditions) == 1:
            return always(*conditions)
        return {leaf: self.disj(found) if len(found) > 1 else found[0] for leaf, found in conditions.items()}

    def select(self, condition: Formula, then: Cases, other: Cases) -> Cases:
        """`then` where the condition holds, else `other`."""
        where, elsewhere = condition, negate(condition)
        chosen = [(leaf, self.conj([where, c])) for leaf, c in then.items()]
        return self.cases([*chosen, *((leaf, self.conj([elsewhere, c])) for leaf, c in other.items())])

    def either(self, condition: Formula, then: Formula, other: Formula) -> Formula:
        """`then` where the condition holds, else `other`."""
        return self.disj([self.conj([condition, then]), self.conj([negate(condition), other])])

    def lift(self, operation: Callable[..., Number], *operands: Cases) -> Cases:
        """An operation on leaves, applied case by case."""
        return self.cases((operation(*leaves), when) for leaves, when in self._together(operands))

    def test(self, predicate: Callable[..., Formula], *operands: Cases) -> Formula:
        """A condition on leaves, asked case by case."""
        return self.disj(self.conj([when, predicate(*leaves)]) for leaves, when in self._together(operands))

    def _together(self, operands: tuple[Cases, ...]) -> Iterable[tuple[tuple[Number, ...], Formula]]:
        for combination in product(*(cases.items() for cases in operands)):
            when = self.conj(condition for _, condition in combination)
            if when != FALSE:
                yield tuple(leaf for leaf, _ in combination), when


def _all(parts: Iterable[Formula]) -> Formula:
    distinct = tuple(parts)
    return distinct[0] if len(distinct) == 1 else All(distinct)


def _require_few(parts: Sized) -> None:
    if len(parts) > MAX_PARTS:
        raise NotUnderstood
