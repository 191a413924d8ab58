"""Sorts what is added to, or filled into, the scores: a proven mask, an opaque mask, or a bias; and empty rows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnopt.mask import FULL, And, KeyPadding, Mask, Opaque, Or
from attnopt.passes.layout import Axes, Dims, Space
from attnopt.passes.masks import MaskReading, Role, may_have_empty_rows, read_additive, read_visible
from attnopt.passes.site import Operand, Roles
from attnopt.passes.sizes import Size, product
from attnopt.passes.terms import Fill, Term, held_as
from attnopt.rule import Reject
from attnopt.spec import EmptyRow

#: A finite fill at or below this leaves a weight of exactly 0 beside any visible key.
NEGLIGIBLE = -1e9
#: A finite fill at or below this absorbs any score that is added to it.
ABSORBING = -1e30


@dataclass(frozen=True, slots=True)
class Hidden:
    """One source of hidden keys: a mask, its tensors, and the value that hidden logits get."""

    mask: Mask
    operands: Mapping[str, Operand]
    fill: float


@dataclass(frozen=True, slots=True)
class Logits:
    """What the spec says about masks and biases, and the tensors it needs for that."""

    mask: Mask = FULL
    empty_row: EmptyRow = EmptyRow.NEVER
    bias: tuple[str, ...] = ()
    operands: Mapping[str, Operand] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LogitsReader:
    """Reads fills and terms of one site.

    given: a mask that the call states without a tensor. safe: the softmax returns zeros for an empty row.
    """

    space: Space
    roles: Roles
    given: Mask = FULL
    safe: bool = False

    def read(self, fills: Iterable[Fill], terms: Iterable[Term]) -> Logits:
        """Everything between the scaled scores and the softmax."""
        filled = [self._fill(fill) for fill in fills]
        if self.given != FULL:
            filled.append(Hidden(self.given, {}, -torch.inf))
        read = [(term, self._additive(term)) for term in terms]
        added = [hidden for _, hidden in read if hidden is not None]
        biases = [term for term, hidden in read if hidden is None]
        empty = self._empty_row([*filled, *added], added, biased=bool(biases))
        if empty is not None:
            return self._combine([*filled, *added], biases, empty)
        # An added finite number that a row without visible keys would notice stays what it is: a bias.
        finite = [hidden for hidden in added if hidden.fill != -torch.inf]
        biases = [term for term, hidden in read if hidden is None or hidden in finite]
        kept = [hidden for hidden in added if hidden not in finite]
        empty = self._empty_row([*filled, *kept], kept, biased=bool(biases))
        if empty is None:
            raise Reject("rows that see no key would mix several fill values")
        return self._combine([*filled, *kept], biases, empty)

    def _fill(self, fill: Fill) -> Hidden:
        if not fill.value <= max(NEGLIGIBLE, torch.finfo(fill.dtype).min):
            raise Reject(f"masked scores become {fill.value:g}, which still weighs", fill.node)
        value = held_as(fill.value, fill.casts)
        roles = self.roles_of(fill.dims)
        if roles is None:
            operand = Operand(fill.node, self.space.resolve(fill.dims), negated=fill.hides)
            return Hidden(Opaque("mask"), {"mask": operand}, value)
        reading = read_visible(fill.node, roles, self.sizes(), negated=fill.hides)
        return Hidden(reading.mask, self._operands(reading), value)

    def _additive(self, term: Term) -> Hidden | None:
        value = term.node.meta.get("val")
        if not isinstance(value, Tensor):
            raise Reject("a number that depends on sizes is added to the scores", term.node)
        roles = self.roles_of(term.dims)
        if roles is None or not value.dtype.is_floating_point or term.factor <= 0:
            return None
        reading = read_additive(term.node, roles, self.sizes())
        if reading is None or reading.fill * term.factor > max(NEGLIGIBLE, torch.finfo(value.dtype).min):
            return None
        fill = held_as(reading.fill * term.factor, term.casts)
        return Hidden(reading.visible.mask, self._operands(reading.visible), fill)

    def _empty_row(self, hidden: list[Hidden], added: list[Hidden], *, biased: bool) -> EmptyRow | None:
        """What an empty row returns; None when no single meaning states it."""
        mask = _all(h.mask for h in hidden)
        sizes = self.sizes()
        if not may_have_empty_rows(mask, sizes["i"], sizes["j"]):
            return EmptyRow.ZERO if self.safe and biased else EmptyRow.NEVER
        if all(h.fill == -torch.inf for h in hidden):
            return EmptyRow.ZERO if self.safe else EmptyRow.NAN
        alone = len(hidden) == 1 and not biased
        absorbs = hidden[0].fill <= ABSORBING or not added
        return EmptyRow.UNIFORM if alone and absorbs else None

    def _combine(self, hidden: list[Hidden], biases: list[Term], empty: EmptyRow) -> Logits:
        operands: dict[str, Operand] = {}
        mask: Mask = FULL
        for source in hidden:
            names = {name: _unused(name, operands) for name in source.operands}
            operands |= {names[name]: operand for name, operand in source.operands.items()}
            mask = mask & rename(source.mask, names)
        bias = tuple(f"bias{n or ''}" for n in range(len(biases)))
        operands |= {name: self._bias(term) for name, term in zip(bias, biases, strict=True)}
        return Logits(mask, empty, bias, operands)

    def _bias(self, term: Term) -> Operand:
        """What is added, as a number: True counts 1."""
        held = term.node.meta["val"].dtype
        if any(
            torch.finfo(cast.dtype).max < torch.finfo(held).max
            for cast in term.casts
            if held.is_floating_point
        ):
            raise Reject(
                "a bias is added before the scores are cast to a type that may not hold it", term.node
            )
        dtype = None if held.is_floating_point else torch.float32
        return Operand(term.node, self.space.resolve(term.dims), term.factor, dtype=dtype)

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

    def _operands(self, reading: MaskReading) -> dict[str, Operand]:
        axes: dict[Role | None, Axes] = {
            None: (), "b": self.roles.batch, "h": self.roles.heads, "i": self.roles.query, "j": self.roles.key
        }  # fmt: skip
        return {
            name: Operand(leaf.node, tuple(axes[role] for role in leaf.roles), negated=leaf.negated)
            for name, leaf in reading.leaves.items()
        }

    def sizes(self) -> dict[Role, Size]:
        r = self.roles
        named: list[tuple[Role, Axes]] = [("b", r.batch), ("h", r.heads), ("i", r.query), ("j", r.key)]
        return {role: product(a.size for a in axes) for role, axes in named}


def rename(mask: Mask, names: Mapping[str, str]) -> Mask:
    """The same mask reading operands of other names."""
    match mask:
        case And(parts) | Or(parts):
            return type(mask)(tuple(rename(part, names) for part in parts))
        case KeyPadding(name) | Opaque(name):
            return replace(mask, name=names[name])
    return mask


def _all(masks: Iterable[Mask]) -> Mask:
    result: Mask = FULL
    for mask in masks:
        result = result & mask
    return result


def _unused(name: str, taken: Mapping[str, object]) -> str:
    stem = name.rstrip("0123456789")
    candidates = (name, *(f"{stem}{n}" for n in range(1, len(taken) + 2)))
    return next(candidate for candidate in candidates if candidate not in taken)
