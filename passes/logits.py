"""Sorts what is added to, or filled into, the scores: a proven mask, an opaque mask, or a bias; and empty rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnopt.mask import FULL, Mask, Opaque
from attnopt.passes.hidden import (
    CANCELLED,
    HALVED,
    LOST_IN_SUMS,
    MIXED,
    MIXED_FILLS,
    SWAMPED,
    Hidden,
    lies_deeper,
    operands_of,
    together,
    visible_in,
    whole,
)
from attnopt.passes.layout import Axes, Dims, Space
from attnopt.passes.logits_bias import bias_of, check_fits, hiding_number, merged, only_lowers
from attnopt.passes.logits_found import Logits
from attnopt.passes.logits_parted import told_apart
from attnopt.passes.logits_weighing import hidden_number, weighs_beside_others
from attnopt.passes.masks import (
    AdditiveReading,
    MaskReading,
    Role,
    may_have_empty_rows,
    numbers_in,
    read_additive,
    read_visible,
)
from attnopt.passes.scores_factors import faint
from attnopt.passes.site import Operand, Roles
from attnopt.passes.sizes import Size, product
from attnopt.passes.terms import NEGLIGIBLE, Fill, Floor, Term, held_as
from attnopt.rule import Reject
from attnopt.spec import EmptyRow

#: A finite fill at or below this absorbs any score that is added to it.
ABSORBING = -1e30
#: A finite fill at or below this leaves nothing of a score that is added to it even in fp64.
LOST = -1e12


@dataclass(frozen=True, slots=True)
class LogitsReader:
    """Reads fills and terms of one site.

    given: a mask that the call states without a tensor. safe: the softmax returns zeros for an empty row. sinks: a
    sink stands beside the logits, and notices when a whole row is shifted. biases: what is known to be added besides.
    """

    space: Space
    roles: Roles
    given: Mask = FULL
    safe: bool = False
    sinks: bool = False
    biases: tuple[Operand, ...] = ()

    def read(self, fills: Iterable[Fill], terms: Iterable[Term]) -> Logits:
        """Everything between the scaled scores and the softmax."""
        fills, terms = self._parted(tuple(fills), tuple(terms))
        told = {id(f): self._faint(f, fills, terms) for f in fills if not self.is_hiding(f)}
        found = [pair for pair in told.values() if pair is not None]
        kept = [fill for fill in fills if told.get(id(fill)) is None]
        logits = self._read(kept, terms, [*self.biases, *(self._relative(b) for b, _ in found)])
        if logits.empty_row is EmptyRow.NAN:
            check_fits(fills, terms)
        return replace(logits, keys=tuple(keep for _, keep in found))

    def _parted(
        self, fills: tuple[Fill, ...], terms: tuple[Term, ...]
    ) -> tuple[tuple[Fill, ...], tuple[Term, ...]]:
        """The same, with biases told apart from masks that are filled into them, where each query surely sees a key."""
        biases = {n: term for n, term in enumerate(terms) if self.additive(term) is None}
        masked, plain = told_apart(self.space, biases, self.is_hiding)
        hidden = [self._fill(fill).mask for fill in (*fills, *masked) if self.is_hiding(fill)]
        if not masked or self._may_be_empty(visible_in([self.given, *hidden])):
            return fills, terms
        return (*fills, *masked), tuple(plain.get(n, term) for n, term in enumerate(terms))

    def is_hiding(self, fill: Fill) -> bool:
        """Whether a filled score weighs nothing beside a visible one."""
        least = torch.finfo(fill.dtype).min if fill.dtype.is_floating_point else NEGLIGIBLE
        return fill.value <= max(NEGLIGIBLE, least)

    def _faint(
        self, fill: Fill, fills: Sequence[Fill], terms: Sequence[Term]
    ) -> tuple[Operand, Operand] | None:
        others: tuple[Fill | Term, ...] = (*fills, *terms)
        return faint(self.space, self.roles, fill, [other for other in others if other is not fill])

    def _read(self, fills: Sequence[Fill], terms: Sequence[Term], given: Sequence[Operand]) -> Logits:
        """given: biases that are known."""
        if not all(self.is_hiding(fill) for fill in fills):
            return self._weighing(fills, terms, given)
        filled = [self._fill(fill) for fill in fills]
        if self.given != FULL:
            filled.append(Hidden(self.given, {}, -torch.inf))
        read = [(term, self.additive(term)) for term in terms if not self._is_shift(term)]
        added = [hidden for _, hidden in read if hidden is not None]
        inside = [(term, self._fill_inside(term)) for term, hidden in read if hidden is None]
        biases = [*given, *(self._finite_bias(term, fill) for term, fill in inside)]
        over = bool(given) or self._lies_over(fills, terms)
        empty = self._empty_row(filled, added, biased=bool(biases), over=over)
        numbers = [fill for _, fill in inside if fill != -torch.inf]
        raised = [term for term, _ in inside if self._raises(term)]
        if raised and (len(numbers) > len(raised) or any(h.fill != -torch.inf for h in (*filled, *added))):
            raise Reject(CANCELLED)
        if empty is not None and not numbers:
            return self._combine([*filled, *added], biases, empty)
        # An added finite number that a row without visible keys would notice stays what it is: a bias.
        finite = [(term, hidden) for term, hidden in read if hidden is not None and hidden.fill != -torch.inf]
        kept = [hidden for hidden in added if hidden.fill == -torch.inf]
        biases += [self._finite_bias(term, hidden.fill) for term, hidden in finite]
        scaled = any(fill != -torch.inf and term.times for term, fill in inside)
        fills_added = [*numbers, *(hidden.fill for _, hidden in finite)]
        low = bool(finite or len(numbers) > 1) and min(fills_added) <= LOST
        lost = SWAMPED if scaled else LOST_IN_SUMS if low else ""
        if not kept and self._is_outermost(fills, filled, finite):
            return replace(self._combine(filled, biases, EmptyRow.NEVER), forward_only=lost)
        if (finite or numbers) and any(hidden.fill != -torch.inf for hidden in filled):
            raise Reject(MIXED_FILLS)
        empty = self._empty_row(filled, kept, biased=bool(biases), over=over)
        if empty is None:
            raise Reject(MIXED_FILLS)
        return replace(self._combine([*filled, *kept], biases, empty), forward_only=lost)

    def _weighing(self, fills: Sequence[Fill], terms: Sequence[Term], given: Sequence[Operand]) -> Logits:
        """Hidden keys that keep one finite logit, whatever was added to their scores before."""
        if given or self.given != FULL:
            raise weighs_beside_others(fills)
        number = hidden_number(fills, terms, self._is_shift)
        biases = [bias_of(self.space, self.roles, term) for term in terms if not self._is_shift(term)]
        hidden = [self._fill(fill) for fill in fills]
        return replace(self._combine(hidden, biases, EmptyRow.NEVER), hidden_logit=number)

    def _is_outermost(
        self, fills: Sequence[Fill], filled: Sequence[Hidden], added: Sequence[tuple[Term, Hidden]]
    ) -> bool:
        """Whether what the only fill hides is hidden once more by the only finite mask that is added to it."""
        if len(filled) != 1 or len(fills) != 1 or len(added) != 1:
            return False
        (fill,), (hidden,), ((term, other),) = fills, filled, added
        inside = fill.at is not None and term.at is not None and fill.at < term.at
        return inside and lies_deeper(hidden, other, ABSORBING) and not self._may_be_empty(hidden.mask)

    def _may_be_empty(self, mask: Mask) -> bool:
        sizes = self.sizes()
        return may_have_empty_rows(mask, sizes["i"], sizes["j"])

    def _is_shift(self, term: Term) -> bool:
        """Whether a term is the row's own largest logit: without it the softmax is the same, NaN for empty rows too."""
        tops, held = (set(self.space.leaves(axes)) for axes in (term.tops, merged(term.dims)))
        key = set(self.roles.key)
        return tops == key and not held & key and not self.safe and not self.sinks

    def _fill(self, fill: Fill) -> Hidden:
        value = held_as(fill.value, fill.casts)
        roles, sizes = self._labels(fill.dims)
        reading = (
            None
            if roles is None
            else whole(read_visible(fill.node, roles, sizes, negated=fill.hides, at=fill.at), roles)
        )
        if reading is None:
            operand = Operand(fill.node, self.space.resolve(fill.dims), negated=fill.hides)
            return Hidden(Opaque("mask"), {"mask": operand}, value)
        return self._hidden(reading, value)

    def additive(self, term: Term) -> Hidden | None:
        """What an added tensor hides, if that is all it does."""
        value = term.node.meta.get("val")
        if not isinstance(value, Tensor):
            raise Reject("a number that depends on sizes is added to the scores", term.node)
        if not value.dtype.is_floating_point or term.factor <= 0 or term.times:
            return None
        (roles, _), reading = self._labels(term.dims), self._read_additive(term)
        visible = None if reading is None or roles is None else whole(reading.visible, roles)
        if reading is None or visible is None:
            return None
        fill = held_as(reading.fill * term.factor, term.casts)
        if any(isinstance(hold, Floor) and hold.halves for hold in term.casts) and reading.fill != -torch.inf:
            return replace(self._hidden(visible, fill, passes=True), halves=True)
        return self._hidden(visible, fill, passes=reading.fill != -torch.inf)

    def _read_additive(self, term: Term) -> AdditiveReading | None:
        """What an added tensor says about visibility, if it is 0 or a number that hides, once multiplied."""
        roles, sizes = self._labels(term.dims)
        reading = None if roles is None else read_additive(term.node, roles, sizes, at=term.at)
        held = term.node.meta["val"].dtype
        if reading is None or reading.fill * term.factor > max(NEGLIGIBLE, torch.finfo(held).min):
            return None
        return reading

    def _raises(self, term: Term) -> bool:
        """Whether a bias lifts keys by so much that their scores are absorbed."""
        roles, sizes = self._labels(term.dims)
        if roles is None or not term.node.meta["val"].dtype.is_floating_point:
            return False
        held = numbers_in(term.node, roles, sizes, at=term.at)
        if not held and -torch.inf < hiding_number(term) <= ABSORBING:
            return term.factor < 0 or not only_lowers(term.node)
        return max((number * term.factor for number in held), default=0.0) >= -ABSORBING

    def _fill_inside(self, term: Term) -> float:
        """The finite number that a bias may hide keys with, be it scaled, laid out by no role, or no proven mask.

        -inf if it hides none, or by -inf.
        """
        reading = self._read_additive(term) if term.factor > 0 else None
        return hiding_number(term) if reading is None else held_as(reading.fill * term.factor, term.casts)

    def _hidden(self, reading: MaskReading, fill: float, *, passes: bool = False) -> Hidden:
        first, *others = (
            Hidden(mask, operands_of(self.roles, reading, mask), fill, passes)
            for mask in (reading.mask, *reading.otherwise)
        )
        return replace(first, otherwise=tuple(others))

    def _lies_over(self, fills: Sequence[Fill], terms: Sequence[Term]) -> bool:
        """Whether something is added to what a mask fills: then a row that it fills whole is not all one number."""
        return any(f.at is None or t.at is None or f.at < t.at for f in fills for t in terms)

    def _empty_row(
        self, filled: list[Hidden], added: list[Hidden], *, biased: bool, over: bool
    ) -> EmptyRow | None:
        """What an empty row returns; None when no single meaning states it."""
        hidden = [*filled, *added]
        if not self._may_be_empty(visible_in(h.mask for h in hidden)):
            return EmptyRow.ZERO if self.safe and biased else EmptyRow.NEVER
        if all(h.fill == -torch.inf for h in hidden):
            return EmptyRow.ZERO if self.safe else EmptyRow.NAN
        alike = not added and len({h.fill for h in filled}) == 1  # one after the other, with one number
        if (len(hidden) != 1 and not alike) or (biased and (added or over)):
            return None
        if hidden[0].passes:
            return EmptyRow.ABSORBED if hidden[0].fill <= ABSORBING else None
        return EmptyRow.UNIFORM

    def _combine(self, hidden: list[Hidden], biases: list[Operand], empty: EmptyRow) -> Logits:
        mask, operands = together(hidden)
        others = [[h.otherwise[k] if h.otherwise else h for h in hidden] for k in (0, -1)]
        otherwise = tuple(together(other) for other in others if other != hidden)
        bias = tuple(f"bias{n or ''}" for n in range(len(biases)))
        added = dict(zip(bias, biases, strict=True))
        halved = empty is EmptyRow.ABSORBED and any(h.halves for h in hidden)
        return Logits(mask, empty, bias, operands | added, otherwise, HALVED if halved else "")

    def _finite_bias(self, term: Term, fill: float) -> Operand:
        """A finite number that hides keys, as a bias."""
        operand = bias_of(self.space, self.roles, term)
        return operand if fill <= LOST else self._relative(operand)

    def _relative(self, bias: Operand) -> Operand:
        """The bias less its row's largest, which a softmax alone takes no notice of.

        A row that is hidden altogether would otherwise lie so low that the logarithm of its sum, from which gradients
        are computed, says little of its scores.
        """
        return bias if self.sinks else replace(bias, function="relative")

    def roles_of(self, dims: Dims) -> tuple[Role | None, ...] | None:
        """The role of each dimension, or None when some dimension mixes roles."""
        known: dict[Axes, Role | None] = {(): None}
        named: list[tuple[Axes, Role]] = [
            (self.roles.batch, "b"), (self.roles.heads, "h"), (self.roles.query, "i"), (self.roles.key, "j")
        ]  # fmt: skip
        for axes, role in named:
            known.setdefault(axes, role)
        resolved = self.space.resolve(dims)
        return tuple(known[axes] for axes in resolved) if all(axes in known for axes in resolved) else None

    def _labels(self, dims: Dims) -> tuple[tuple[Role | None, ...] | None, dict[Role, Size]]:
        """The roles of the dimensions, x and y for two that are a part of a role or several; and all sizes."""
        resolved, sizes = self.space.resolve(dims), self.sizes()
        mixed = [n for n, axes in enumerate(resolved) if self.roles_of((axes,)) is None]
        if len(mixed) > len(MIXED):
            return None, sizes
        spare = dict(zip(mixed, MIXED, strict=False))
        sizes |= {role: product(a.size for a in resolved[n]) for n, role in spare.items()}
        plain = self.roles_of(tuple(() if n in spare else axes for n, axes in enumerate(resolved))) or ()
        return tuple(spare.get(n, role) for n, role in enumerate(plain)), sizes

    def sizes(self) -> dict[Role, Size]:
        r = self.roles
        named: list[tuple[Role, Axes]] = [("b", r.batch), ("h", r.heads), ("i", r.query), ("j", r.key)]
        return {role: product(a.size for a in axes) for role, axes in named}
