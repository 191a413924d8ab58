"""Rules for products that add nothing up: outer products, and einsum where the result has each letter."""

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import sympy

from attnopt.passes.mask_formula import Cases, NotUnderstood
from attnopt.passes.mask_numbers import compute, convert
from attnopt.passes.mask_reader import At, Rule, Value


def _outer(at: At) -> Value:
    left, right = ("self", "vec2") if "vec2" in at.args else ("input", "vec2")
    return _product(at, [(at.args[left], at.index[:1]), (at.args[right], at.index[1:])])


def _einsum(at: At) -> Value:
    """Each operand at the positions of its letters."""
    equation = str(at.args["equation"]).replace(" ", "")
    inputs, arrow, output = equation.partition("->")
    if not arrow or "." in equation or len(set(output)) != len(output):
        raise NotUnderstood
    places = dict(zip(output, at.index, strict=True))
    letters = inputs.split(",")
    if not set("".join(letters)) <= places.keys():
        raise NotUnderstood
    operands = zip(at.args["tensors"], letters, strict=True)
    return _product(at, [(given, tuple(places[letter] for letter in own)) for given, own in operands])


def _product(at: At, operands: list[tuple[Any, tuple[sympy.Expr, ...]]]) -> Cases:
    dtype = at.node.meta["val"].dtype
    factors = [
        at.logic.lift(lambda x: convert(x, dtype, at.logic.bounds), at.numbers(given, index))
        for given, index in operands
    ]
    result = factors[0]
    for factor in factors[1:]:
        result = at.logic.lift(partial(compute, "mul"), result, factor)
    return result


PRODUCTS: Mapping[object, Rule] = MappingProxyType({"outer": _outer, "ger": _outer, "einsum": _einsum})
