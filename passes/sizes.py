"""Arithmetic on sizes that may be symbolic, without ever installing a guard."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._sympy.symbol import SymT, symbol_is_type

#: A size: an int, or a sympy expression over the symbols of the graph.
Size: TypeAlias = int | sympy.Expr


def size_of(value: int | torch.SymInt) -> Size:
    """The size as an int where it is one, else as its sympy expression."""
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        return int(expr) if expr.is_number else _implied(value, expr)
    return int(value)


def _implied(value: torch.SymInt, expr: sympy.Expr) -> Size:
    """An expression that the guards so far leave one value: s // 2, say, after something was broadcast along it."""
    seen = None if expr.is_Symbol else getattr(value.node, "hint", None)
    return expr if seen is None or not statically_known_true(value == seen) else int(seen)


def shape_of(node: Node) -> tuple[Size, ...]:
    """The shape of the tensor that a shadow node makes; a symbolic number is broadcast like one without dimensions."""
    return tuple(size_of(s) for s in getattr(node.meta["val"], "shape", ()))


def is_one(size: Size) -> bool:
    """Whether the size is 1 for certain."""
    return size == 1


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for certain."""
    return bool(a == b) or (not (isinstance(a, int) and isinstance(b, int)) and sympy.expand(a - b) == 0)


def divide(a: Size, b: Size) -> Size | None:
    """a / b when that is certainly a whole number, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    quotient = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    if sympy.fraction(quotient)[1] != 1:
        return None
    return int(quotient) if quotient.is_number else quotient


def product(sizes: Any) -> Size:
    """The product of sizes; 1 for none."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def hint(value: int | torch.SymInt, default: int = 128) -> int:
    """A plausible number for a size: its own value, or the one seen while tracing, or `default`."""
    if not isinstance(value, torch.SymInt):
        return int(value)
    seen = value.node.maybe_as_int() if value.node.expr.is_number else getattr(value.node, "hint", None)
    return default if seen is None else int(seen)


def is_float_input(value: Any) -> bool:
    """Whether a number is made of floats alone that came in from outside, such as attributes of a module."""
    if not isinstance(value, torch.SymFloat):
        return False
    symbols = value.node.expr.free_symbols
    return bool(symbols) and all(symbol_is_type(symbol, SymT.FLOAT) for symbol in symbols)


def seen_float(value: torch.SymFloat) -> float | None:
    """The number that a symbolic one was while tracing, without a guard; None where sizes or data make it."""
    if value.node.expr.is_number:
        return float(value.node.expr)
    seen = getattr(value.node, "hint", None) if is_float_input(value) else None
    return None if seen is None else float(seen)


def is_positive(value: Any) -> bool:
    """Whether a symbolic number is above 0 for certain: made of lengths by operations that keep it so."""
    return isinstance(value, torch.SymInt | torch.SymFloat) and _is_above_zero(value.node.expr)


def _is_above_zero(expr: sympy.Basic) -> bool:
    if isinstance(expr, sympy.Symbol):
        return bool(expr.is_positive)
    if expr.is_number:
        return bool(expr > 0)
    name = type(expr).__name__
    operands = expr.args[:1] if name in _POWERS else expr.args
    return name in _KEEP_SIGN | _POWERS and all(map(_is_above_zero, operands))


#: Sympy's and torch's names of what is above 0 if all its operands are, or if the first is.
_KEEP_SIGN = frozenset(
    {"Add", "Mul", "ToFloat", "IntTrueDiv", "FloatTrueDiv", "OpaqueUnaryFn_sqrt", "OpaqueUnaryFn_exp"}
)
_POWERS = frozenset({"Pow", "FloatPow", "PowByNatural"})


def seen_symbols(values: Iterable[Any]) -> dict[sympy.Symbol, int]:
    """The symbols of which sizes are made, each with the number that it was while tracing, where that is known."""
    seen: dict[sympy.Symbol, int] = {}
    for value in values:
        if isinstance(value, torch.SymInt):
            environment = value.node.shape_env
            known = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
            seen |= {s: int(known[s]) for s in value.node.expr.free_symbols if s in known}
    return seen


@dataclass(slots=True)
class Concrete:
    """Numbers for sizes: `literals` replaces numbers of the graph by smaller ones, `symbols` values each symbol."""

    literals: Mapping[int, int] = field(default_factory=dict)
    symbols: dict[sympy.Symbol, int] = field(default_factory=dict)

    def of(self, size: Size | torch.SymInt) -> int:
        """The number for one size. Symbols not seen before get small odd numbers, all different.

        Raises ValueError where a size is divided by one that these numbers make 0.
        """
        known = size_of(size) if isinstance(size, torch.SymInt) else size
        if isinstance(known, int):
            return self.literals.get(known, known)
        for symbol in sorted(known.free_symbols, key=str):
            self.symbols.setdefault(symbol, 5 + 2 * len(self.symbols))
        try:
            return int(known.subs(self.symbols))
        except ZeroDivisionError as problem:
            raise ValueError(f"{known} has no value where {self.symbols}") from problem

    def number(self, value: torch.SymInt | torch.SymFloat) -> float:
        """The number for a symbolic one: for a float from outside that which was seen while tracing."""
        if not isinstance(value, torch.SymFloat):
            return self.of(value)
        seen, expr = seen_float(value), value.node.expr
        if seen is not None:
            return seen
        environment = value.node.shape_env
        known = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
        is_float = {symbol: symbol_is_type(symbol, SymT.FLOAT) for symbol in expr.free_symbols}
        return float(expr.subs({s: known[s] if held else self.of(s) for s, held in is_float.items()}))
