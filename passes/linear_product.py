"""Products of several tensors that are summed over shared letters: matmul and its kind, and einsum of any length."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from attnopt.passes.contraction import Letters, contraction, einsum_terms
from attnopt.passes.layout import Axes, Dims, Space
from attnopt.passes.sizes import is_one, shape_of

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class End:
    """A tensor that enters a product, or is multiplied onto one; its dimensions, and the node that reads it."""

    node: Node
    dims: Dims
    user: Node


@dataclass(frozen=True, slots=True)
class Product:
    """out[letters] = factor * sum over letters absent from `out` of the product of the terms."""

    node: Node
    terms: tuple[tuple[Node, Letters], ...]
    out: Letters
    factor: float = 1.0


def product_of(node: Node) -> Product | None:
    """The node as a product, or None; also None where another tensor is added to it."""
    form = contraction(node)
    if form is not None:
        both = ((form.lhs, form.lhs_letters), (form.rhs, form.rhs_letters))
        return Product(node, both, form.out_letters, form.factor) if form.added is None else None
    if node.op != "call_function" or node.target != aten.einsum.default:
        return None
    terms, out = einsum_terms(node)
    return Product(node, terms, out) if _is_plain(terms, out) else None


def ends_of(space: Space, form: Product, out: Dims) -> tuple[End, ...]:
    """The terms with their dimensions, given those of the result; summed letters become fresh axes."""
    known: dict[str, Axes] = dict(zip(form.out, out, strict=True))
    for node, letters in form.terms:
        for letter, size in zip(letters, shape_of(node), strict=True):
            if not known.get(letter):
                known[letter] = space.fresh(size)
    return tuple(End(node, _dims(node, letters, known), form.node) for node, letters in form.terms)


def _dims(node: Node, letters: Letters, known: dict[str, Axes]) -> Dims:
    """A dimension of size 1 is broadcast: it has no axis, whatever its letter stands for elsewhere."""
    return tuple(() if is_one(size) else known[x] for x, size in zip(letters, shape_of(node), strict=True))


def _is_plain(terms: Sequence[tuple[Node, Letters]], out: Letters) -> bool:
    """No letter twice in one term, and each summed letter in at least two."""
    letters = [x for _, term in terms for x in term]
    if any(len(set(term)) != len(term) for _, term in terms) or len(set(out)) != len(out):
        return False
    return set(out) <= set(letters) and all(x in out or letters.count(x) > 1 for x in letters)
