"""Scores that are blended with a number: `scores * m + number * (1 - m)` for a mask m of zeros and ones is a fill.

So GPT and GPT-2 hid keys at first (https://github.com/openai/finetune-transformer-lm), and many copies do.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import sympy
from torch import Tensor
from torch.fx import Node

from attnopt.passes.layout import Dims
from attnopt.passes.mask_bounds import Role
from attnopt.passes.mask_formula import Cases, NotUnderstood
from attnopt.passes.mask_numbers import is_constant
from attnopt.passes.mask_reader import as_numbers
from attnopt.passes.mask_rules import reader_for
from attnopt.passes.sizes import Size
from attnopt.passes.terms import Fill, Scores, Term

ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


class Labels(Protocol):
    """Tells what the dimensions of a tensor count."""

    def roles_of(self, dims: Dims) -> tuple[Role | None, ...] | None:
        """The role of each dimension; None where one is none, or a part of one."""

    def sizes(self) -> Mapping[Role, Size]:
        """Of all roles."""


def blended(labels: Labels, scores: Scores) -> Scores:
    """The scores with each factor of zeros and ones, and the number that is added where it is 0, told as a fill.

    The same for scores that are finite: 0 times infinity is NaN.
    """
    for factor in scores.factors if scores.softcap is None else ():
        for term in scores.terms:
            fill = _fill(labels, scores, factor, term)
            if fill is not None:
                return blended(labels, _with_fill(scores, factor, term, fill))
    return scores


def _with_fill(scores: Scores, factor: Term, term: Term, fill: Fill) -> Scores:
    return replace(
        scores,
        factors=tuple(f for f in scores.factors if f is not factor),
        terms=tuple(t for t in scores.terms if t is not term),
        fills=(*scores.fills, fill),
    )


def _fill(labels: Labels, scores: Scores, factor: Term, term: Term) -> Fill | None:
    """The fill that a factor and a term are together; None if they are not, or if anything lies between them."""
    between = [t for t in scores.terms if factor in t.times]
    if factor.inverse or term.times or between or scores.fills or term.at is None:
        return None
    kept, added = (_cases(labels, part) for part in (factor, term))
    if kept is None or added is None or set(kept) != {ZERO, ONE} or len(added) != 2:
        return None
    numbers = [leaf for leaf in added if leaf != ZERO]
    if len(numbers) != 1 or not is_constant(numbers[0]) or added[numbers[0]] != kept[ZERO]:
        return None
    value = term.factor * float(numbers[0])
    dtype = term.at.meta["val"].dtype
    return Fill(factor.node, factor.dims, value, hides=False, dtype=dtype, casts=term.casts, at=term.at)


def _cases(labels: Labels, part: Term) -> Cases | None:
    """The values that a tensor takes, and where; None where that is not known."""
    roles = labels.roles_of(part.dims)
    if roles is None or not isinstance(part.node, Node) or not isinstance(part.node.meta.get("val"), Tensor):
        return None
    reader = reader_for(part.node, labels.sizes())
    try:
        return as_numbers(reader.logic, reader.read(part.node, roles, None))
    except NotUnderstood:
        return None
