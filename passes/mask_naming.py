"""Gives a condition its name in the mask algebra, and says from which tensors of the graph it could be read instead."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from attnopt.mask import And, Causal, Full, KeyPadding, Mask, Opaque, Or, Window, band
from attnopt.mask_blocks import Segments
from attnopt.passes.mask_algebra import Algebra, algebra_for, all_of, some_of, with_implied_diagonal
from attnopt.passes.mask_bounds import POSITIONS
from attnopt.passes.mask_formula import All, Fact, Formula, Lag, Same, Some, parts_of
from attnopt.passes.mask_leaves import Candidate, Leaf, candidates, cover, find_leaf, stated, stating
from attnopt.passes.mask_numbers import moved
from attnopt.passes.mask_packed import with_positions_in_runs
from attnopt.passes.mask_reader import MaskReader

#: A condition inside another that reads more tensors than this is one tensor, not several.
MOST_NESTED = 4


@dataclass(frozen=True, slots=True)
class MaskReading:
    """A mask, and the tensors behind the names in it.

    leaves: `padding...` (KeyPadding; roles j, and b unless it is the same for all sequences), `mask...` and `held...`
    (Opaque), `query_ids...` and `key_ids...` (Segments; integers). otherwise: the same mask in other words, each with
    fewer proven parts and more that is read from a tensor, for kernels that cannot use what is proven.
    """

    mask: Mask
    leaves: Mapping[str, Leaf] = field(default_factory=dict)
    otherwise: tuple[Mask, ...] = ()


@dataclass
class Naming:
    """One mask being named. whole: a boolean tensor that states all of it, if the graph is known to have one."""

    reader: MaskReader
    visible: Formula
    whole: Leaf | None
    given: list[Candidate] = field(default_factory=list)
    leaves: dict[str, Leaf] = field(default_factory=dict)

    def read(self) -> MaskReading | None:
        """The reading; None where some part is neither proven nor stated by a tensor."""
        formula = with_positions_in_runs(self.reader, self.visible)
        algebra = algebra_for(self.reader.logic.bounds, formula)
        self.given = candidates(self.reader)
        named = {part: self._conjunct(algebra, part) for part in parts_of(formula)}
        mask = self._with_tensors(algebra, named, "mask")
        if mask is None:
            return None
        banded = {part: found if _fits_a_band(found) else None for part, found in named.items()}
        less = None if banded == named else self._with_tensors(algebra, banded, "held")
        otherwise = dict.fromkeys(m for m in (less, self._as_tensor(mask)) if m is not None and m != mask)
        return MaskReading(mask, self.leaves, tuple(otherwise))

    def _with_tensors(self, algebra: Algebra, named: Mapping[Formula, Mask | None], stem: str) -> Mask | None:
        """What is named, and tensors for the rest; what these state needs no tensor of its own."""
        missing = frozenset(part for part, found in named.items() if found is None)
        whole = frozenset(parts_of(self.visible))
        tensors = cover(self.given, whole, missing)
        if tensors is None and self.whole is None:
            return None
        told = whole if tensors is None else stated(self.given, tensors)
        kept = (found for part, found in named.items() if part not in told or not _reads(found))
        mask = with_implied_diagonal(algebra, all_of(kept))
        if tensors is None and self.whole is not None:
            return mask & self._read_from(self.whole, stem)
        for leaf in tensors or ():
            mask = mask & self._read_from(leaf, stem, padded=_has_padding(mask))
        return mask

    def _read_from(self, leaf: Leaf, stem: str, *, padded: bool = False) -> Mask:
        """A boolean tensor as a mask; kernels take one padding beside other masks."""
        if leaf.is_padding and not padded:
            return KeyPadding(self._name(leaf, "padding"))
        return Opaque(self._name(leaf, stem))

    def _name(self, leaf: Leaf, stem: str) -> str:
        """The name of a leaf, its own if it has none of this kind yet."""
        alike = {name: held for name, held in self.leaves.items() if name.rstrip("0123456789") == stem}
        found = next((name for name, held in alike.items() if held == leaf), f"{stem}{len(alike) or ''}")
        self.leaves[found] = leaf
        return found

    def _conjunct(self, algebra: Algebra, part: Formula) -> Mask | None:
        """A part of the whole mask; what only a tensor tells is left to `cover`."""
        if isinstance(part, Fact | Lag) or len(list(_facts(part))) > MOST_NESTED:
            return None
        return self._named(algebra, part)

    def _named(self, algebra: Algebra, formula: Formula) -> Mask | None:
        match formula:
            case Fact() | Lag():
                leaf = stating(self.given, frozenset({formula}))
                return None if leaf is None else self._read_from(leaf, "mask")
            case Same(holds=True):
                return self._segments(formula)
            case All(parts) if parts:
                masks = [self._named(algebra, part) for part in parts]
                return None if None in masks else all_of(masks)
            case Some(parts) if parts:
                masks = [self._named(algebra, part) for part in parts]
                return None if None in masks else some_of(masks)
        return algebra.mask(formula)

    def _segments(self, same: Same) -> Mask | None:
        query, key = (find_leaf(self.reader, number) for number in (same.query, same.key))
        if query is None or key is None or not _only(query, "bi") or not _only(key, "bj"):
            return None
        aligned = moved(same.query, POSITIONS["i"], POSITIONS["j"]) == same.key
        return Segments(self._name(query, "query_ids"), self._name(key, "key_ids"), aligned)

    def _as_tensor(self, mask: Mask) -> Mask | None:
        """The whole mask as one tensor that the graph holds anyway."""
        if all(isinstance(part, Full | KeyPadding | Opaque) for part in _conjuncts(mask)):
            return None
        leaf = stating(self.given, frozenset(parts_of(self.visible))) or self.whole
        return None if leaf is None else Opaque(self._name(leaf, "held"))


def _reads(mask: Mask | None) -> bool:
    return mask is not None and bool(mask.operand_names())


def _only(leaf: Leaf, allowed: str) -> bool:
    return {role for role in leaf.roles if role} <= set(allowed)


def _facts(formula: Formula) -> Iterator[Formula]:
    """What only data tell."""
    match formula:
        case All(parts) | Some(parts):
            for part in parts:
                yield from _facts(part)
        case Fact() | Same() | Lag():
            yield formula


def _conjuncts(mask: Mask) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, And) else (mask,)


def _has_padding(mask: Mask) -> bool:
    return any(isinstance(part, KeyPadding) for part in _conjuncts(mask))


def _fits_a_band(mask: Mask | None) -> bool:
    """Whether blockwise kernels have a place for this conjunct."""
    if isinstance(mask, Window):
        return True
    if isinstance(mask, Or):
        windows = [part for part in mask.parts if isinstance(part, Window)]
        return band(mask & Causal(windows[0].offset) if windows else mask) is not None
    return mask is not None and band(mask) is not None
