"""Indices under reshapes: dimensions that become one, and one that becomes several, where sizes are known."""

from collections.abc import Sequence

import sympy
from torch.utils._sympy.functions import FloorDiv, PythonMod

from attnopt.passes.mask_formula import NotUnderstood
from attnopt.passes.sizes import Size, product, same

#: An index, and the size of the dimension that it runs over.
Sized = tuple[sympy.Expr, Size]


def regrouped(kept: Sequence[Sized], sizes: Sequence[Size]) -> list[sympy.Expr]:
    """The index into dimensions of these sizes, of the element that the `kept` indices show after a reshape.

    No size is 1. Raises NotUnderstood where it cannot be told which dimensions belong together.
    """
    found: list[sympy.Expr] = []
    pending, rest = list(kept), list(sizes)
    while pending and rest:
        after, before = _group([size for _, size in pending], rest)
        found += _apart(_together(pending[:after]), rest[:before])
        pending, rest = pending[after:], rest[before:]
    if pending or rest:
        raise NotUnderstood
    return found


def _group(after: Sequence[Size], before: Sequence[Size]) -> tuple[int, int]:
    """How many of the first dimensions after the reshape, and before it, have the same elements."""
    for n in range(1, max(len(after), len(before)) + 1):
        if n <= len(before) and same(after[0], product(before[:n])):
            return 1, n
        if n <= len(after) and same(before[0], product(after[:n])):
            return n, 1
    raise NotUnderstood


def _together(parts: Sequence[Sized]) -> sympy.Expr:
    """The index into a dimension that became several."""
    (index, _), *others = parts
    for e, size in others:
        index = index * sympy.sympify(size) + e
    return sympy.expand(index)


def _apart(index: sympy.Expr, sizes: Sequence[Size]) -> list[sympy.Expr]:
    """The indices into dimensions that became one, of which all but the first have known sizes."""
    digits: list[sympy.Expr] = []
    for size in reversed(sizes[1:]):
        if not isinstance(size, int):
            raise NotUnderstood
        digits.append(PythonMod(index, sympy.Integer(size)))
        index = FloorDiv(index, sympy.Integer(size))
    return [index, *reversed(digits)]
