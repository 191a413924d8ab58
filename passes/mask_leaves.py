"""Tensors of the graph that a proven mask still reads: which of them say what, and which are the best to read."""

from collections.abc import Iterator
from dataclasses import dataclass

import sympy
from torch.fx import Node

from attnopt.passes.mask_bounds import POSITIONS, Role
from attnopt.passes.mask_formula import (
    Cases,
    Fact,
    Formula,
    Index,
    NotUnderstood,
    Number,
    negate,
    parts_of,
)
from attnopt.passes.mask_reader import MaskReader
from attnopt.passes.sizes import Size, is_one, shape_of


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
class Candidate:
    """A boolean tensor that could be a leaf, and the conjuncts that it states."""

    leaf: Leaf
    says: frozenset[Formula]

    def rank(self) -> tuple[int, int, Node]:
        """The best has the least: says no more than needed, is not negated, was made first."""
        return len(self.says), int(self.leaf.negated), self.leaf.node


def candidates(reader: MaskReader) -> list[Candidate]:
    """All tensors that the last reading depends on and that may be leaves, the best first."""
    found = []
    for (node, index), value in reader.reached().items():
        if isinstance(value, Formula):
            for negated, formula in ((False, value), (True, negate(value))):
                says = frozenset(parts_of(formula))
                leaf = leaf_at(reader, node, index, negated=negated) if says else None
                if leaf is not None:
                    found.append(Candidate(leaf, says))
    return sorted(found, key=Candidate.rank)


def cover(
    given: list[Candidate], whole: frozenset[Formula], missing: frozenset[Formula]
) -> list[Leaf] | None:
    """Tensors that together state `missing`, and nothing that the `whole` mask does not; None if there are none."""
    allowed = [c for c in given if c.says <= whole]
    leaves = [c.leaf for c in _alone(allowed, missing)]
    missing = missing - {part for c in _alone(allowed, missing) for part in c.says}
    while missing:
        best = max(allowed, key=lambda c: len(c.says & missing), default=None)
        if best is None or not best.says & missing:
            return None
        tied = [c for c in allowed if len(c.says & missing) == len(best.says & missing)]
        leaves.append(tied[0].leaf)
        missing = missing - tied[0].says
    return leaves


def _alone(given: list[Candidate], missing: frozenset[Formula]) -> Iterator[Candidate]:
    """The padding of each conjunct that one padding states."""
    for part in sorted((p for p in missing if isinstance(p, Fact)), key=lambda p: p.data.node):
        yield from [c for c in given if c.says == {part} and c.leaf.is_padding][:1]


def stated(given: list[Candidate], leaves: list[Leaf]) -> frozenset[Formula]:
    """All that these tensors state."""
    return frozenset(part for c in given if c.leaf in leaves for part in c.says)


def stating(given: list[Candidate], says: frozenset[Formula]) -> Leaf | None:
    """The best tensor that states exactly this."""
    return next((c.leaf for c in given if c.says == says), None)


def leaf_at(reader: MaskReader, node: Node, index: Index, *, negated: bool = False) -> Leaf | None:
    """The tensor as a leaf, if each of its dimensions runs over one role, whole, and nothing writes to it later."""
    try:
        roles = tuple(_role(reader, e, size) for e, size in zip(index, shape_of(node), strict=True))
    except NotUnderstood:
        return None
    named = [role for role in roles if role is not None]
    if len(named) != len(set(named)) or reader.written(node):
        return None
    return Leaf(node, roles, negated)


def _role(reader: MaskReader, at: sympy.Expr, size: Size) -> Role | None:
    """The role that a dimension of `size` runs over; None for a single element."""
    counts = reader.logic.bounds.counts
    role = next((role for role, symbol in POSITIONS.items() if symbol == at), None)
    if role is not None and (counts[at] == size or sympy.expand(counts[at] - size) == 0):
        return role
    if not is_one(size):
        raise NotUnderstood
    return None


def find_leaf(reader: MaskReader, value: Number) -> Leaf | None:
    """The first tensor of the graph whose element is `value` everywhere."""
    found = (
        leaf_at(reader, node, index)
        for (node, index), held in reader.reached().items()
        if _is_always(held, value)
    )
    return next((leaf for leaf in found if leaf is not None), None)


def _is_always(held: Formula | Cases, value: Number) -> bool:
    return not isinstance(held, Formula) and len(held) == 1 and value in held
