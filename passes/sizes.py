"""Arithmetic on sizes that may be symbolic, without ever installing a guard."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import sympy
import torch
from torch.fx import Node

#: A size: an int, or a sympy expression over the symbols of the graph.
Size: TypeAlias = int | sympy.Expr


def size_of(value: int | torch.SymInt) -> Size:
    """The size as an int where it is one, else as its sympy expression."""
    if isinstance(value, torch.SymInt):
        expr = value.node.expr
        return int(expr) if expr.is_number else expr
    return int(value)


def shape_of(node: Node) -> tuple[Size, ...]:
    """The shape of the tensor that a shadow node makes."""
    return tuple(size_of(s) for s in node.meta["val"].shape)


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


@dataclass(slots=True)
class Concrete:
    """Numbers for sizes: `literals` replaces numbers of the graph by smaller ones, `symbols` values each symbol."""

    literals: Mapping[int, int] = field(default_factory=dict)
    symbols: dict[sympy.Symbol, int] = field(default_factory=dict)

    def of(self, size: Size | torch.SymInt) -> int:
        """The number for one size. Symbols not seen before get small odd numbers, all different."""
        known = size_of(size) if isinstance(size, torch.SymInt) else size
        if isinstance(known, int):
            return self.literals.get(known, known)
        for symbol in sorted(known.free_symbols, key=str):
            self.symbols.setdefault(symbol, 5 + 2 * len(self.symbols))
        return int(known.subs(self.symbols))
