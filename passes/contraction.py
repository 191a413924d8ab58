"""One normal form for matmul, bmm, baddbmm, einsum and the like: two operands, a letter per dimension."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.constants import present
from attnopt.passes.layout import CASTS, COPIES, RESHAPES, Axes, Dims, Space, input_node, permutation
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
    reader = _READERS.get(node.target) if node.op == "call_function" else None
    form = None if reader is None else reader(node)
    return form if form is not None and _is_plain(form) else None


def scaled_by_sizes(node: Node) -> tuple[Contraction, Node] | None:
    """A baddbmm whose alpha is made of sizes, as if alpha were 1; and alpha, which the reader has to apply."""
    alpha = node.kwargs.get("alpha")
    if _READERS.get(node.target) is not _baddbmm or not isinstance(alpha, Node) or present(alpha) is not None:
        return None
    form = _blended(node, 1.0)
    return None if form is None else (form, alpha)


def summed_product(node: Node) -> Contraction | None:
    """(x * y).sum(dims) as a contraction of x and y, or None."""
    if node.target != aten.sum.dim_IntList or node.kwargs or len(node.args) > 2:
        return None
    product, dims = node.args
    if not isinstance(product, Node) or product.target != aten.mul.Tensor or not dims:
        return None
    rank = len(shape_of(product))
    letters = tuple(f"s{k}" for k in range(rank))
    summed = {int(d) % rank for d in dims}  # type: ignore[union-attr, arg-type]
    out = tuple(x for k, x in enumerate(letters) if k not in summed)
    return _elementwise(node, product.args[0], product.args[1], letters, out)


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


def _ranks(*operands: object) -> tuple[int, ...] | None:
    """The number of dimensions of each, if all are tensors."""
    tensors = [x for x in operands if isinstance(x, Node) and isinstance(x.meta.get("val"), Tensor)]
    return tuple(len(shape_of(x)) for x in tensors) if len(tensors) == len(operands) else None


def _product(node: Node) -> Contraction | None:
    return _matmul(node, *node.args[:2])


def _matmul(node: Node, lhs: Any, rhs: Any) -> Contraction | None:
    ranks = _ranks(lhs, rhs)
    if (
        ranks is None
        or 0 in ranks
        or any(r == 1 and _is_weight(x) for r, x in zip(ranks, (lhs, rhs), strict=True))
    ):
        return None
    batch = tuple(f"b{k}" for k in reversed(range(max(*ranks, 2) - 2)))
    left, right = (
        ("c",) if rank == 1 else (*_last(batch, rank - 2), *own)
        for rank, own in zip(ranks, (("m", "c"), ("c", "n")), strict=True)
    )
    rows, columns = (("m",) if ranks[0] > 1 else ()), (("n",) if ranks[1] > 1 else ())
    return Contraction(node, lhs, rhs, left, right, (*batch, *rows, *columns))


def _last(letters: Letters, n: int) -> Letters:
    return letters[len(letters) - n :]


def _baddbmm(node: Node) -> Contraction | None:
    alpha = present(node.kwargs.get("alpha", 1))
    return None if alpha is None else _blended(node, alpha)


def _blended(node: Node, alpha: float) -> Contraction | None:
    added, lhs, rhs = node.args[:3]
    form, beta = _matmul(node, lhs, rhs), present(node.kwargs.get("beta", 1))
    if form is None or not isinstance(added, Node) or beta is None:
        return None
    return replace(form, factor=alpha, added=added if beta else None, added_factor=beta)


def _inner(node: Node) -> Contraction | None:
    lhs, rhs = node.args[:2]
    ranks = _ranks(lhs, rhs)
    if ranks is None or 0 in ranks:
        return None
    left, right = (
        tuple(f"{side}{k}" for k in range(rank - 1)) for side, rank in zip("lr", ranks, strict=True)
    )
    return Contraction(node, lhs, rhs, (*left, "c"), (*right, "c"), (*left, *right))  # type: ignore[arg-type]


def _linear(node: Node) -> Contraction | None:
    """A product with a tensor that is computed; one with a weight is a layer of its own."""
    lhs, rhs = node.args[:2]
    ranks = _ranks(lhs, rhs)
    if ranks is None or ranks[1] != 2 or 0 in ranks or _is_weight(rhs):  # type: ignore[arg-type]
        return None
    rows = tuple(f"l{k}" for k in range(ranks[0] - 1))
    added = node.args[2] if len(node.args) > 2 else None
    form = Contraction(node, lhs, rhs, (*rows, "c"), ("n", "c"), (*rows, "n"))  # type: ignore[arg-type]
    return replace(form, added=added)  # type: ignore[arg-type]


def _is_weight(node: Node) -> bool:
    """An input as it stands, or a view or a cast of one: a product with it is a layer, or a pooling."""
    while node.target in _VIEWS or permutation(node) is not None:
        node = input_node(node)
    return node.op != "call_function"


def _tensordot(node: Node) -> Contraction | None:
    lhs, rhs, left_dims, right_dims = node.args[:4]
    ranks = _ranks(lhs, rhs)
    if ranks is None:
        return None
    left, right = ([f"{side}{k}" for k in range(rank)] for side, rank in zip("lr", ranks, strict=True))
    for a, b in zip(left_dims, right_dims, strict=True):  # type: ignore[arg-type]
        right[int(b)] = left[int(a)]
    kept = tuple(x for x in (*left, *right) if (x in left) != (x in right))
    return Contraction(node, lhs, rhs, tuple(left), tuple(right), kept)  # type: ignore[arg-type]


def _vecdot(node: Node) -> Contraction | None:
    rank = len(shape_of(node)) + 1
    letters = tuple(f"s{k}" for k in range(rank))
    at = int(node.kwargs.get("dim", -1)) % rank  # type: ignore[arg-type]
    return _elementwise(node, node.args[0], node.args[1], letters, letters[:at] + letters[at + 1 :])


def _elementwise(node: Node, lhs: Any, rhs: Any, letters: Letters, out: Letters) -> Contraction | None:
    """A product element by element, broadcast to `letters`, and summed over those that `out` lacks."""
    ranks = _ranks(lhs, rhs)
    if ranks is None:
        return None
    left, right = (_last(letters, rank) for rank in ranks)
    form = Contraction(node, lhs, rhs, left, right, out)
    return form if _is_plain(form) else None


def _einsum(node: Node) -> Contraction | None:
    terms, out = einsum_terms(node)
    if len(terms) != 2:
        return None
    (lhs, left), (rhs, right) = terms
    return Contraction(node, lhs, rhs, left, right, out)


def einsum_terms(node: Node) -> tuple[tuple[tuple[Node, Letters], ...], Letters]:
    """The operands of an einsum, each with its letters, and the letters of the result; "..." becomes letters too."""
    operands: Sequence[Node] = node.args[1]  # type: ignore[assignment]
    inputs, arrow, out = str(node.args[0]).replace(" ", "").partition("->")
    out = out if arrow else _implied_output(inputs)
    letters = [lettered(term, len(shape_of(x))) for term, x in zip(inputs.split(","), operands, strict=True)]
    return tuple(zip(operands, letters, strict=True)), lettered(out, len(shape_of(node)))


def _implied_output(inputs: str) -> str:
    letters = inputs.replace(",", "").replace("...", "")
    return ("..." if "..." in inputs else "") + "".join(
        sorted(x for x in set(letters) if letters.count(x) == 1)
    )


def lettered(term: str, rank: int) -> Letters:
    """The letters of one term of an einsum, of so many dimensions; those under "..." have names of their own."""
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


_VIEWS = RESHAPES | COPIES | CASTS | {aten.detach.default}
_READERS: dict[object, Callable[[Node], Contraction | None]] = {
    **dict.fromkeys(
        (
            aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default, aten.dot.default,
            aten.matmul.out, aten.bmm.out, aten.mm.out, aten.mv.out,
        ),
        _product,
    ),
    **dict.fromkeys(
        (
            aten.baddbmm.default, aten.addmm.default, aten.baddbmm_.default, aten.addmm_.default, aten.baddbmm.out,
            aten.addmm.out,
        ),
        _baddbmm,
    ),
    aten.einsum.default: _einsum,
    aten.inner.default: _inner,
    aten.linear.default: _linear,
    aten.tensordot.default: _tensordot,
    aten.linalg_vecdot.default: _vecdot,
}  # fmt: skip
