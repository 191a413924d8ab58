"""One normal form for matmul, bmm, mm, baddbmm and einsum: two operands, a letter per dimension."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
from torch.fx import Node

from attnopt.passes.layout import Axes, Dims, Space
from attnopt.passes.sizes import is_one, shape_of

aten = torch.ops.aten

Letters = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Contraction:
    """out[letters] = factor * sum over letters absent from out of lhs[letters] * rhs[letters], plus beta * added."""

    node: Node
    lhs: Node
    rhs: Node
    lhs_letters: Letters
    rhs_letters: Letters
    out_letters: Letters
    factor: float = 1.0
    added: Node | None = None
    added_factor: float = 1.0

    @property
    def contracted(self) -> Letters:
        """Letters that are summed over."""
        return tuple(x for x in self.lhs_letters if x not in self.out_letters)


def contraction(node: Node) -> Contraction | None:
    """The node as a contraction of two tensors, or None."""
    if node.op != "call_function":
        return None
    if node.target in (aten.matmul.default, aten.bmm.default, aten.mm.default):
        return _matmul(node, *node.args[:2])
    if node.target in (aten.baddbmm.default, aten.addmm.default):
        return _baddbmm(node)
    if node.target == aten.einsum.default:
        return _einsum(node)
    return None


def label_up(space: Space, form: Contraction, out: Dims) -> tuple[Dims, Dims]:
    """Labels of both operands from those of the result; summed letters become fresh axes."""
    known = dict(zip(form.out_letters, out, strict=True))
    for node, letters in ((form.lhs, form.lhs_letters), (form.rhs, form.rhs_letters)):
        for letter, size in zip(letters, shape_of(node), strict=True):
            known[letter] = known.get(letter) or space.fresh(size)  # () where the other operand is broadcast
    return _operand(form.lhs, form.lhs_letters, known), _operand(form.rhs, form.rhs_letters, known)


def label_down(space: Space, form: Contraction, operand: Node, dims: Dims) -> tuple[Dims, Dims]:
    """Labels of the other operand and of the result from those of one operand."""
    mine, other, node = _sides(form, operand)
    known = dict(zip(mine, dims, strict=True))
    for letter, size in zip(other, shape_of(node), strict=True):
        if not known.get(letter):
            known[letter] = space.fresh(size)
    return _operand(node, other, known), tuple(known[letter] for letter in form.out_letters)


def other_operand(form: Contraction, operand: Node) -> Node:
    """The operand that is not `operand`."""
    return form.rhs if form.lhs is operand else form.lhs


def _sides(form: Contraction, operand: Node) -> tuple[Letters, Letters, Node]:
    if form.lhs is operand:
        return form.lhs_letters, form.rhs_letters, form.rhs
    return form.rhs_letters, form.lhs_letters, form.lhs


def _operand(node: Node, letters: Letters, known: dict[str, Axes]) -> Dims:
    """A dimension of size 1 is broadcast: it has no axis, whatever its letter stands for elsewhere."""
    return tuple(() if is_one(size) else known[x] for x, size in zip(letters, shape_of(node), strict=True))


def _matmul(node: Node, lhs: object, rhs: object) -> Contraction | None:
    if not (isinstance(lhs, Node) and isinstance(rhs, Node)):
        return None
    ranks = len(shape_of(lhs)), len(shape_of(rhs))
    if min(ranks) < 2:
        return None
    batch = tuple(f"b{k}" for k in reversed(range(max(ranks) - 2)))
    left, right = (
        (*_last(batch, rank - 2), *own) for rank, own in zip(ranks, (("m", "c"), ("c", "n")), strict=True)
    )
    return Contraction(node, lhs, rhs, left, right, (*batch, "m", "n"))


def _last(letters: Letters, n: int) -> Letters:
    return letters[len(letters) - n :]


def _baddbmm(node: Node) -> Contraction | None:
    added, lhs, rhs = node.args[:3]
    form = _matmul(node, lhs, rhs)
    beta, alpha = node.kwargs.get("beta", 1), node.kwargs.get("alpha", 1)
    if (
        form is None
        or not isinstance(added, Node)
        or not all(isinstance(x, int | float) for x in (alpha, beta))
    ):
        return None
    return Contraction(
        node, form.lhs, form.rhs, form.lhs_letters, form.rhs_letters, form.out_letters,
        factor=float(alpha), added=added if beta else None, added_factor=float(beta),  # type: ignore[arg-type]
    )  # fmt: skip


def _einsum(node: Node) -> Contraction | None:
    terms, out = einsum_terms(node)
    if len(terms) != 2:
        return None
    (lhs, left), (rhs, right) = terms
    form = Contraction(node, lhs, rhs, left, right, out)
    return form if _is_plain(form) else None


def einsum_terms(node: Node) -> tuple[tuple[tuple[Node, Letters], ...], Letters]:
    """The operands of an einsum, each with its letters, and the letters of the result; "..." becomes letters too."""
    operands: Sequence[Node] = node.args[1]  # type: ignore[assignment]
    inputs, arrow, out = str(node.args[0]).replace(" ", "").partition("->")
    out = out if arrow else _implied_output(inputs)
    letters = [
        _expand_dots(term, len(shape_of(x))) for term, x in zip(inputs.split(","), operands, strict=True)
    ]
    return tuple(zip(operands, letters, strict=True)), _expand_dots(out, len(shape_of(node)))


def _implied_output(inputs: str) -> str:
    letters = inputs.replace(",", "").replace("...", "")
    return ("..." if "..." in inputs else "") + "".join(
        sorted(x for x in set(letters) if letters.count(x) == 1)
    )


def _expand_dots(term: str, rank: int) -> Letters:
    if "..." not in term:
        return tuple(term)
    before, after = term.split("...")
    hidden = rank - len(before) - len(after)
    names = [f"dot{k}" for k, _ in zip(count(), range(hidden), strict=False)]
    return (*before, *reversed(names), *after)


def _is_plain(form: Contraction) -> bool:
    """No repeated letter, and each summed letter stands in both operands."""
    for letters in (form.lhs_letters, form.rhs_letters, form.out_letters):
        if len(set(letters)) != len(letters):
            return False
    left, right, out = set(form.lhs_letters), set(form.rhs_letters), set(form.out_letters)
    return out <= left | right and (left ^ right) <= out
