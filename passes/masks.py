"""The mask calculus: proves which keys a query sees, from the nodes that compute a mask.

A mask subgraph is interpreted as a condition on the positions (b, h, i, j) (mask_reader, mask_rules), each conjunct
of which is named in the mask algebra or read from a tensor of the graph (mask_naming). Symbolic sizes stay symbolic,
and no guard is installed. What is not understood is never guessed: it is a leaf, or the whole mask is.

Positions are taken to stay below 2^24 where they are kept in float32 and sizes are symbolic.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import sympy
import torch
from torch.fx import Node

from attnopt.passes.mask_algebra import may_have_empty_rows
from attnopt.passes.mask_bounds import Role
from attnopt.passes.mask_formula import FALSE, Cases, Formula, NotUnderstood, negate
from attnopt.passes.mask_leaves import Leaf, find_leaf, leaf_at
from attnopt.passes.mask_naming import MaskReading, Naming
from attnopt.passes.mask_numbers import is_constant, round_to
from attnopt.passes.mask_reader import MaskReader, as_condition
from attnopt.passes.mask_rules import reader_for
from attnopt.passes.sizes import Size
from attnopt.rule import Reject

__all__ = [
    "AdditiveReading",
    "Leaf",
    "MaskReading",
    "Role",
    "find_leaf",
    "leaf_at",
    "may_have_empty_rows",
    "numbers_in",
    "read_additive",
    "read_visible",
]

#: A finite fill at or below this leaves nothing of a weight beside a visible key.
NEGLIGIBLE = -1e9

Reading = TypeVar("Reading")


@dataclass(frozen=True, slots=True)
class AdditiveReading:
    """A mask that is added to the scores: 0 where visible, `fill` elsewhere."""

    visible: MaskReading
    fill: float


def read_visible(
    node: Node,
    roles: tuple[Role | None, ...],
    sizes: Mapping[Role, Size],
    *,
    negated: bool = False,
    at: Node | None = None,
) -> MaskReading:
    """What a boolean tensor says about visibility; each conjunct that cannot be proven is a leaf.

    node: True where the key is visible (negated: where it is hidden). roles: of each dimension of `node`, None for
    size 1. sizes: of all four roles. at: the node that reads the mask; without it, a mask that is written to in
    place after something has read it is refused. Raises Reject for that, and for numbers that are not proven 0 or 1.
    """
    reader = reader_for(node, sizes)
    key = ("visible", node, roles, negated, _moment(reader, node, at))
    return _once(reader, key, lambda: _visible(reader, Leaf(node, roles, negated), at))


def _visible(reader: MaskReader, whole: Leaf, at: Node | None) -> MaskReading:
    try:
        visible = as_condition(reader.logic, reader.read(whole.node, whole.roles, at))
    except NotUnderstood:
        raise Reject(
            "the mask is written to in place, or holds numbers that are not known to be 0 and 1", whole.node
        ) from None
    is_leaf = whole.node.meta["val"].dtype == torch.bool and not reader.written(whole.node)
    stated = negate(visible) if whole.negated else visible
    reading = Naming(reader, stated, whole if is_leaf else None).read()
    if reading is None:
        raise Reject("no boolean tensor of the graph says what part of the mask hides", whole.node)
    return reading


def read_additive(
    node: Node, roles: tuple[Role | None, ...], sizes: Mapping[Role, Size], *, at: Node | None = None
) -> AdditiveReading | None:
    """A float tensor that is added to the scores, if it is provably 0 or one constant that hides; else None.

    The constant is at most -1e9, or the least number of the dtype, or -inf. Arguments as in `read_visible`.
    """
    if not node.meta["val"].dtype.is_floating_point:
        return None
    reader = reader_for(node, sizes)
    key = ("additive", node, roles, _moment(reader, node, at))
    return _once(reader, key, lambda: _additive(reader, node, roles, at))


def _additive(
    reader: MaskReader, node: Node, roles: tuple[Role | None, ...], at: Node | None
) -> AdditiveReading | None:
    try:
        value = reader.read(node, roles, at)
    except NotUnderstood:
        return None
    fill = None if isinstance(value, Formula) else _fill(value, node.meta["val"].dtype)
    if fill is None or isinstance(value, Formula):
        return None
    reading = Naming(reader, value.get(sympy.Integer(0), FALSE), None).read()
    return None if reading is None else AdditiveReading(reading, fill)


def numbers_in(
    node: Node, roles: tuple[Role | None, ...], sizes: Mapping[Role, Size], *, at: Node | None = None
) -> tuple[float, ...]:
    """The numbers that a float tensor consists of; () if that is not known. Arguments as in `read_visible`."""
    reader = reader_for(node, sizes)
    try:
        value = reader.read(node, roles, at)
    except NotUnderstood:
        return ()
    constants = [] if isinstance(value, Formula) else [leaf for leaf in value if is_constant(leaf)]
    if isinstance(value, Formula) or len(constants) < len(value):
        return ()
    return tuple(round_to(float(leaf), node.meta["val"].dtype) for leaf in constants)


def _moment(reader: MaskReader, node: Node, at: Node | None) -> int | None:
    """How many writes to the node its reader sees; None if nobody says who reads it."""
    written = reader.written(node)
    return len(reader.written(node, at)) if at is not None or not written else None


def _once(reader: MaskReader, key: object, read: Callable[[], Reading]) -> Reading:
    """The layers of a model share their masks: each is read for the first of them."""
    if key not in reader.readings:
        reader.readings[key] = read()
    found: Reading = reader.readings[key]
    return found


def _fill(cases: Cases, dtype: torch.dtype) -> float | None:
    """The one value besides 0, if it hides; -inf where nothing is hidden."""
    numbers = [leaf for leaf in cases if leaf != 0]
    constants = [leaf for leaf in numbers if is_constant(leaf)]
    if len(numbers) > 1 or len(constants) < len(numbers):
        return None
    fill = round_to(float(constants[0]), dtype) if constants else -math.inf
    return fill if fill <= max(NEGLIGIBLE, torch.finfo(dtype).min) else None
