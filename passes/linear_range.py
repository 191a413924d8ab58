"""Between which numbers a number lies, whatever the position: enough to tell the sign of a decay made of constants."""

from collections.abc import Callable, Mapping
from itertools import product
from math import exp, inf, isnan, log, nextafter
from types import MappingProxyType

import sympy
from torch.fx import Node

from attnopt.buffers import BUFFER
from attnopt.passes.mask_bounds import Bounds
from attnopt.passes.mask_formula import Call, Data, Number
from attnopt.passes.mask_literals import Negative, form_of
from attnopt.passes.mask_numbers import is_constant
from attnopt.passes.mask_writes import writes_after

Range = tuple[float, float]

ANYTHING: Range = (-inf, inf)
#: The least number above 0.
LEAST = nextafter(0.0, 1.0)


def range_of(number: Number, bounds: Bounds) -> Range:
    """The least and the greatest value; infinite where nothing is known."""
    if is_constant(number):
        return float(number), float(number)
    match number:
        case Data(node, _) if _is_held_below_zero(node):
            return -inf, -LEAST
        case sympy.Expr():
            return bounds.lower(number), bounds.upper(number)
        case Call(op, args) if op in _CORNERS:
            return _of_corners(_CORNERS[op], [range_of(x, bounds) for x in args])
    return ANYTHING


def _is_held_below_zero(node: Node) -> bool:
    """Whether a module holds numbers below 0 there, which a check at run time then sees to."""
    buffer = node.meta.get(BUFFER)
    if buffer is None or buffer.handed is not None or form_of(buffer.value) != Negative():
        return False
    buffer.read = buffer.read or not writes_after(node, None)
    return bool(buffer.read)


def _of_corners(operation: Callable[..., float], operands: list[Range]) -> Range:
    """Of an operation that rises or falls in each operand: what it is where each is at one of its ends."""
    try:
        corners = [operation(*ends) for ends in product(*operands)]
    except (ArithmeticError, ValueError, TypeError):
        return ANYTHING
    return ANYTHING if any(map(isnan, corners)) else (min(corners), max(corners))


def _power(base: float, exponent: float) -> float:
    if base <= 0:
        raise ValueError(base)
    return exp(exponent * log(base))


def _quotient(a: float, b: float) -> float:
    if b <= 0:
        raise ValueError(b)
    return a / b


def _logarithm(x: float) -> float:
    return -inf if x == 0 else log(x)


_CORNERS: Mapping[str, Callable[..., float]] = MappingProxyType(
    {
        "add": lambda a, b: a + b,
        "sub": lambda a, b: a - b,
        "mul": lambda a, b: a * b,
        "neg": lambda a: -a,
        "div": _quotient,
        "pow": _power,
        "exp": exp,
        "log": _logarithm,
    }
)
