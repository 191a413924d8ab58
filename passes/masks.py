"""The mask calculus: proves which keys a query sees, from the nodes that compute a mask.

A mask subgraph is interpreted as a condition on the positions (b, h, i, j) (mask_reader, mask_rules), each conjunct
of which is named in the mask algebra (mask_algebra) or read from a tensor of the graph: a `Leaf`. Symbolic sizes
stay symbolic, and no guard is installed. What is not understood is never guessed: it is a leaf, or the whole mask is.

Positions are taken to stay below 2^24 where they are kept in float32 and sizes are symbolic.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import sympy
import torch
from torch.fx import Node

from attnopt.mask import FULL, KeyPadding, Mask, Opaque
from attnopt.passes.mask_algebra import algebra_for, may_have_empty_rows, with_implied_diagonal
from attnopt.passes.mask_bounds import POSITIONS, Role
from attnopt.passes.mask_formula import (
    FALSE,
    Cases,
    Fact,
    Formula,
    Index,
    NotUnderstood,
    Number,
    negate,
    parts_of,
)
from attnopt.passes.mask_numbers import is_constant, round_to
from attnopt.passes.mask_reader import MaskReader, as_condition
from attnopt.passes.mask_rules import reader_for
from attnopt.passes.mask_writes import writes_after
from attnopt.passes.sizes import Size, is_one, shape_of
from attnopt.rule import Reject

__all__ = [
    "AdditiveReading",
    "Leaf",
    "MaskReading",
    "Role",
    "find_leaf",
    "may_have_empty_rows",
    "read_additive",
    "read_visible",
]

#: A finite fill at or below this leaves nothing of a weight beside a visible key.
NEGLIGIBLE = -1e9


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor of the graph that a proven mask still reads.

    node: a shadow node. roles: what each of its dimensions counts; None for one of size 1 that is broadcast.
    negated: the mask reads its logical complement.
    """

    node: Node
    roles: tuple[Role | None, ...]
    negated: bool = False

    @property
    def is_padding(self) -> bool:
        """Whether it says something about keys alone, whatever the head and the query."""
        return {"j"} <= {role for role in self.roles if role} <= {"b", "j"}


@dataclass(frozen=True, slots=True)
class MaskReading:
    """A mask, and the boolean tensors behind the names in it: `padding` (KeyPadding) and `mask...` (Opaque).

    The leaf of a padding has the role j, and b unless it is the same for all sequences.
    """

    mask: Mask
    leaves: Mapping[str, Leaf] = field(default_factory=dict)


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
    try:
        value = reader.read(node, roles, at)
        visible = as_condition(reader.logic, value)
    except NotUnderstood:
        raise Reject(
            "the mask is written to in place, or holds numbers that are not known to be 0 and 1", node
        ) from None
    whole = Leaf(node, roles, negated)
    return _name(reader, negate(visible) if negated else visible, whole)


def read_additive(
    node: Node, roles: tuple[Role | None, ...], sizes: Mapping[Role, Size], *, at: Node | None = None
) -> AdditiveReading | None:
    """A float tensor that is added to the scores, if it is provably 0 or one constant that hides; else None.

    The constant is at most -1e9, or the least number of the dtype, or -inf. Arguments as in `read_visible`.
    """
    dtype = node.meta["val"].dtype
    if not dtype.is_floating_point:
        return None
    reader = reader_for(node, sizes)
    try:
        value = reader.read(node, roles, at)
    except NotUnderstood:
        return None
    if isinstance(value, Formula):
        return None
    fill = _fill(value, dtype)
    if fill is None:
        return None
    visible = value.get(sympy.Integer(0), FALSE)
    try:
        return AdditiveReading(_name(reader, visible, None), fill)
    except Reject:
        return None


def _fill(cases: Cases, dtype: torch.dtype) -> float | None:
    """The one value besides 0, if it hides; -inf where nothing is hidden."""
    numbers = [leaf for leaf in cases if leaf != 0]
    constants = [leaf for leaf in numbers if is_constant(leaf)]
    if len(numbers) > 1 or len(constants) < len(numbers):
        return None
    fill = round_to(float(constants[0]), dtype) if constants else -math.inf
    return fill if fill <= max(NEGLIGIBLE, torch.finfo(dtype).min) else None


def _name(reader: MaskReader, visible: Formula, whole: Leaf | None) -> MaskReading:
    """The mask of a condition: proven conjuncts by name, the others from leaves."""
    algebra = algebra_for(reader.logic.bounds, visible)
    named = {part: algebra.mask(part) for part in parts_of(visible)}
    mask: Mask = FULL
    for part in named.values():
        mask = mask if part is None else mask & part
    mask = with_implied_diagonal(algebra, mask)
    unproven = [part for part, found in named.items() if found is None]
    return _with_leaves(mask, _leaves(reader, visible, unproven, whole))


def _with_leaves(mask: Mask, leaves: Iterable[Leaf]) -> MaskReading:
    """At most one of them is a KeyPadding: kernels take one."""
    held: dict[str, Leaf] = {}
    for leaf in leaves:
        if leaf.is_padding and "padding" not in held:
            held["padding"] = leaf
            mask = mask & KeyPadding("padding")
            continue
        name = f"mask{sum(name.startswith('mask') for name in held) or ''}"
        held[name] = leaf
        mask = mask & Opaque(name)
    return MaskReading(mask, held)


def _leaves(reader: MaskReader, visible: Formula, unproven: list[Formula], whole: Leaf | None) -> list[Leaf]:
    """Tensors of the graph whose conjunction, with what is proven, is the mask."""
    candidates = _candidates(reader, set(parts_of(visible)))
    leaves: list[Leaf] = []
    missing = set(unproven)
    for part in unproven:
        alone = [c for c in candidates if c.says == {part} and isinstance(part, Fact) and c.leaf.is_padding]
        if alone and part in missing:
            leaves.append(min(alone, key=_Candidate.rank).leaf)
            missing.discard(part)
    while missing:
        best = max(candidates, key=lambda c: (len(c.says & missing), *(-r for r in c.rank())), default=None)
        if best is None or not best.says & missing:
            return _everything(whole)
        leaves.append(best.leaf)
        missing -= best.says
    return leaves


def _everything(whole: Leaf | None) -> list[Leaf]:
    if whole is None or whole.node.meta["val"].dtype != torch.bool or writes_after(whole.node, None):
        raise Reject(
            "no boolean tensor of the graph says what part of the mask hides", whole.node if whole else None
        )
    return [whole]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A tensor that could be a leaf, and the conjuncts of the mask that it states."""

    leaf: Leaf
    says: frozenset[Formula]
    order: int

    def rank(self) -> tuple[int, int, int]:
        """The best has the least: says no more than needed, is not negated, was made first."""
        return len(self.says), int(self.leaf.negated), self.order


def _candidates(reader: MaskReader, wanted: set[Formula]) -> list[_Candidate]:
    found: list[_Candidate] = []
    order: dict[Node, int] = {}
    for (node, index), value in reader.seen.items():
        if not isinstance(value, Formula):
            continue
        for negated, formula in ((False, value), (True, negate(value))):
            says = frozenset(parts_of(formula))
            if says and says <= wanted:
                leaf = leaf_at(reader, node, index, negated=negated)
                if leaf is not None:
                    order = order or {n: k for k, n in enumerate(node.graph.nodes)}
                    found.append(_Candidate(leaf, says, order[node]))
    return found


def leaf_at(reader: MaskReader, node: Node, index: Index, *, negated: bool = False) -> Leaf | None:
    """The tensor as a leaf, if each of its dimensions runs over one role, whole, and nothing writes to it later."""
    try:
        roles = tuple(_role(reader, e, size) for e, size in zip(index, shape_of(node), strict=True))
    except NotUnderstood:
        return None
    named = [role for role in roles if role is not None]
    if len(named) != len(set(named)) or writes_after(node, None):
        return None
    return Leaf(node, roles, negated)


def _role(reader: MaskReader, at: sympy.Expr, size: Size) -> Role | None:
    """The role that a dimension of `size` runs over; None for a single element."""
    counts = reader.logic.bounds.counts
    role = next((role for role, symbol in POSITIONS.items() if symbol == at), None)
    if role is not None and sympy.expand(counts[at] - size) == 0:
        return role
    if not is_one(size):
        raise NotUnderstood
    return None


def find_leaf(reader: MaskReader, value: Number) -> Leaf | None:
    """The first tensor of the graph whose element is `value` everywhere."""
    found = (
        leaf_at(reader, node, index) for (node, index), held in reader.seen.items() if _is_always(held, value)
    )
    return next((leaf for leaf in found if leaf is not None), None)


def _is_always(held: Formula | Cases, value: Number) -> bool:
    return not isinstance(held, Formula) and len(held) == 1 and value in held
