"""Arithmetic on the leaves of mask values: exact on integers, in double on constants, else left as a `Call`."""

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import sympy
import torch
from torch.fx import Node
from torch.utils._sympy.functions import FloorDiv, PythonMod

from attnopt.passes.constants import present
from attnopt.passes.mask_bounds import POSITIONS, Bounds, integer_of
from attnopt.passes.mask_formula import (
    FALSE,
    TRUE,
    Call,
    Data,
    Formula,
    Lag,
    Logic,
    NotUnderstood,
    Number,
    Same,
    negate,
)

#: Integers up to here are exact in a dtype. Where sizes are symbolic, positions are taken to stay below 2^24.
EXACT_BELOW = {torch.float64: 2**53, torch.float32: 2**24, torch.float16: 2**11, torch.bfloat16: 2**8}
#: Dtypes wide enough for positions whose bound is not known.
WIDE = frozenset({torch.int64, torch.int32, torch.float64, torch.float32})


def as_leaf(given: Any) -> Number:
    """A Python number, a SymInt, or a node that holds one."""
    if isinstance(given, bool):
        return sympy.Integer(int(given))
    if isinstance(given, Node) and isinstance(given.meta.get("val"), torch.SymFloat):
        given = present(given)
    if isinstance(given, float):
        return from_float(given)
    found = integer_of(given)
    if found is None:
        raise NotUnderstood
    return found


def from_float(value: float) -> Number:
    """Whole numbers as integers, so that 1.0 and 1 are one leaf."""
    return sympy.Integer(int(value)) if value.is_integer() else value


def is_constant(leaf: Number) -> TypeGuard[float]:
    """Whether the leaf is one known number."""
    return isinstance(leaf, float | sympy.Integer)


def convert(leaf: Number, dtype: torch.dtype, bounds: Bounds) -> Number:
    """`leaf` in a tensor of `dtype`: constants overflow as they do there; NotUnderstood where the value may change.

    Finite constants are not rounded (see `is_exact`), nor is opaque data that goes from one float to another.
    """
    if dtype not in EXACT_BELOW:
        return _as_integer(leaf, dtype, bounds)
    if is_constant(leaf):
        rounded = round_to(_double(leaf), dtype)
        return rounded if math.isinf(rounded) else leaf
    if isinstance(leaf, sympy.Expr):
        _require_range(leaf, bounds, -EXACT_BELOW[dtype], EXACT_BELOW[dtype], unknown=dtype in WIDE)
    elif is_whole(leaf):  # of any size: it may be rounded
        raise NotUnderstood
    return leaf


def _as_integer(leaf: Number, dtype: torch.dtype, bounds: Bounds) -> Number:
    if dtype.is_floating_point or dtype.is_complex:
        raise NotUnderstood
    if isinstance(leaf, Data) and leaf.node.meta["val"].dtype == dtype:
        return leaf
    if isinstance(leaf, Call) and dtype == torch.int64 and is_whole(leaf):
        return leaf
    if not isinstance(leaf, sympy.Expr):
        raise NotUnderstood
    _require_range(leaf, bounds, torch.iinfo(dtype).min, torch.iinfo(dtype).max, unknown=dtype in WIDE)
    return leaf


def is_whole(leaf: Number) -> bool:
    """Whether the number is a whole one that an int64 tensor holds, or made of such by whole arithmetic."""
    match leaf:
        case Data(node, _):
            return bool(node.meta["val"].dtype == torch.int64)
        case Call(op, args):
            return op in WHOLE and all(map(is_whole, args))
    return isinstance(leaf, sympy.Expr) and leaf.is_integer is not False


def reads(leaf: Number, position: sympy.Symbol) -> bool:
    """Whether a number depends on a position."""
    match leaf:
        case Call(_, args):
            return any(reads(argument, position) for argument in args)
        case Data(_, index):
            return any(e.has(position) for e in index)
    return isinstance(leaf, sympy.Expr) and leaf.has(position)


def moved(leaf: Number, position: sympy.Symbol, to: sympy.Expr) -> Number:
    """The same number at another position."""
    match leaf:
        case Call(op, args):
            return Call(op, tuple(moved(argument, position, to) for argument in args))
        case Data(node, index):
            return Data(node, tuple(sympy.sympify(e).subs(position, to) for e in index))
    return leaf.subs(position, to) if isinstance(leaf, sympy.Expr) else leaf


def _is_endless(bound: float) -> bool:
    """Whether a bound is no number; a whole number may be too large to be a float."""
    return not isinstance(bound, int) and math.isinf(bound)


def _require_range(expr: sympy.Expr, bounds: Bounds, least: int, most: int, *, unknown: bool) -> None:
    for bound, limit in ((bounds.upper(expr), most), (bounds.upper(-expr), -least)):
        if bound > limit and not (unknown and _is_endless(bound)):
            raise NotUnderstood


def round_to(value: float, dtype: torch.dtype) -> float:
    """A Python number as a tensor of a floating dtype holds it."""
    if dtype == torch.float64 or not math.isfinite(value):
        return value
    try:
        if dtype == torch.float16:
            return float(struct.unpack("<e", struct.pack("<e", value))[0])
        bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)
    if dtype == torch.bfloat16:
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def is_exact(leaf: Number, dtype: torch.dtype) -> bool:
    """Whether a constant survives in `dtype` unrounded; positions and whole dtypes always do."""
    if not is_constant(leaf) or dtype not in EXACT_BELOW:
        return True
    value = _double(leaf)
    return math.isnan(value) or round_to(value, dtype) == value


def _double(leaf: Number) -> float:
    try:
        return float(leaf)  # type: ignore[arg-type]
    except OverflowError as error:
        raise NotUnderstood from error


def compute(operation: str, *leaves: Number) -> Number:
    """The result of an operation; a Call where it is neither an integer nor a constant."""
    if operation in ON_INTEGERS and all(isinstance(leaf, sympy.Expr) for leaf in leaves):
        exact = ON_INTEGERS[operation](*leaves)
        if exact is not None:
            return sympy.expand(exact)
    if any(isinstance(leaf, float) and math.isnan(leaf) for leaf in leaves):
        raise NotUnderstood
    if operation in ON_CONSTANTS and all(is_constant(leaf) for leaf in leaves):
        try:
            return from_float(float(ON_CONSTANTS[operation](*map(_double, leaves))))
        except (ArithmeticError, ValueError, TypeError) as error:
            raise NotUnderstood from error
    return Call(operation, leaves)


def _floor_divide(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    if not (b.is_Integer and b > 0):
        raise NotUnderstood
    return FloorDiv(a, b)


def _remainder(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    if not (b.is_Integer and b > 0):
        raise NotUnderstood
    return PythonMod(a, b)


#: Operations that make whole numbers of whole numbers.
WHOLE = frozenset({"add", "sub", "mul", "neg", "abs", "maximum", "minimum", "floor_divide", "remainder"})

ON_INTEGERS: Mapping[str, Callable[..., sympy.Expr | None]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "abs": sympy.Abs,
    "maximum": sympy.Max,
    "minimum": sympy.Min,
    "floor_divide": _floor_divide,
    "remainder": _remainder,
    "pow": lambda a, b: a**b if b.is_Integer and 0 <= b <= 2 else None,
}


def _log(value: float) -> float:
    """As torch has it: -inf at 0."""
    return math.log(value) if value != 0 else -math.inf


ON_CONSTANTS: Mapping[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": abs,
    "maximum": max,
    "minimum": min,
    "pow": lambda a, b: a**b,
    "exp": math.exp,
    "log": _log,
    "sqrt": math.sqrt,
}


def at_most(logic: Logic, a: Number, b: Number) -> Formula:
    """a <= b."""
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        return logic.at_most_zero(a - b)
    if is_constant(a) and is_constant(b):
        return TRUE if _double(a) <= _double(b) else FALSE
    if isinstance(a, float) and isinstance(b, sympy.Expr):
        return _within(logic, -b, -a)
    if isinstance(a, sympy.Expr) and isinstance(b, float):
        return _within(logic, a, b)
    return _lag(a, b)


def _lag(a: Number, b: Number) -> Formula:
    """a <= b for elements of one tensor, shifted by known numbers; one is the query's and one the key's."""
    (first, add), (second, less) = _shifted(a), _shifted(b)
    if first.node is not second.node or {_side(first), _side(second)} != {"i", "j"}:
        raise NotUnderstood
    return Lag(first, second, add - less)


def _shifted(leaf: Number) -> tuple[Data, int]:
    """The data and the known number of which a number is the sum."""
    match leaf:
        case Data(_, _) if is_whole(leaf):
            return leaf, 0
        case Call("add", (Data() as data, sympy.Integer() as by)) if is_whole(data):
            return data, int(by)
        case Call("add", (sympy.Integer() as by, Data() as data)) if is_whole(data):
            return data, int(by)
        case Call("sub", (Data() as data, sympy.Integer() as by)) if is_whole(data):
            return data, -int(by)
    raise NotUnderstood


def _side(leaf: Number) -> str:
    """The letter i for a number that depends on the query and not on the key, j the other way round, else ""."""
    at_query, at_key = reads(leaf, POSITIONS["i"]), reads(leaf, POSITIONS["j"])
    return "" if at_query == at_key else "i" if at_query else "j"


def _within(logic: Logic, expr: sympy.Expr, limit: float) -> Formula:
    """expr <= limit, for a limit that is no whole number."""
    if not math.isfinite(limit):
        return TRUE if limit > 0 else FALSE
    return logic.at_most_zero(expr - math.floor(limit))


def below(logic: Logic, a: Number, b: Number) -> Formula:
    """a < b."""
    if any(isinstance(leaf, float) and math.isnan(leaf) for leaf in (a, b)):
        return FALSE
    return negate(at_most(logic, b, a))


def equal(logic: Logic, a: Number, b: Number) -> Formula:
    """a == b."""
    sides = {_side(a): a, _side(b): b}
    is_data = any(isinstance(leaf, Data | Call) for leaf in (a, b))
    if is_data and sides.keys() == {"i", "j"} and is_whole(a) and is_whole(b):
        return Same(sides["i"], sides["j"])
    return logic.conj([at_most(logic, a, b), at_most(logic, b, a)])
