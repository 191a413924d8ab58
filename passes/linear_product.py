"""Products of several tensors that are summed over shared letters: matmul and its kind, einsum of any length, and
the sum of a broadcast product, sum(a * b).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from attnopt.passes.constants import constant
from attnopt.passes.contraction import Letters, contraction, einsum_terms
from attnopt.passes.layout import CASTS, Axes, Dims, Space, is_copy
from attnopt.passes.mask_writes import arguments, operation, writes_after
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
    """out[letters] = factor * sum over letters absent from `out` of the product of the terms.

    inner: the nodes that make it, `node` last. user: the one that reads the terms.
    """

    node: Node
    terms: tuple[tuple[Node, Letters], ...]
    out: Letters
    factor: float = 1.0
    inner: tuple[Node, ...] = ()
    user: Node | None = None


def product_of(node: Node) -> Product | None:
    """The node as a product that sums over something, or None; also None where another tensor is added to it."""
    form = _any_product(node)
    if form is None or not any(_is_summed(form, x) for _, letters in form.terms for x in letters):
        return None
    return form


def plain_product_of(node: Node) -> Product | None:
    """An einsum, or the sum of a broadcast product, that sums over nothing: its terms are multiplied."""
    form = _any_product(node)
    if form is None or any(_is_summed(form, x) for _, letters in form.terms for x in letters):
        return None
    return form


def _is_summed(form: Product, letter: str) -> bool:
    """Whether a letter is summed over, and stands for more than one element."""
    if letter in form.out:
        return False
    sizes = (
        size
        for node, letters in form.terms
        for x, size in zip(letters, shape_of(node), strict=True)
        if x == letter
    )
    return not all(map(is_one, sizes))


def _any_product(node: Node) -> Product | None:
    form = contraction(node)
    if form is not None:
        both = ((form.lhs, form.lhs_letters), (form.rhs, form.rhs_letters))
        added = form.added is not None
        return None if added else Product(node, both, form.out_letters, form.factor, (node,), node)
    if node.op != "call_function":
        return None
    if node.target == aten.einsum.default:
        terms, out = einsum_terms(node)
        return Product(node, terms, out, 1.0, (node,), node) if _is_plain(terms, out) else None
    return _broadcast_sum(node) if node.target == aten.sum.dim_IntList else None


def _broadcast_sum(node: Node) -> Product | None:
    """sum(a * b) over some of its dimensions; constants, casts and copies in between."""
    held = arguments(node)
    product, factor, inner = _multiplied(held["self"])
    if product is None or not held["dim"] or held.get("dtype") not in (None, product.meta["val"].dtype):
        return None
    rank = len(shape_of(product))
    summed = {d % rank for d in held["dim"]}
    letters = tuple(f"s{n}" for n in range(rank))
    kept = tuple(x for n, x in enumerate(letters) if n not in summed)
    if held.get("keepdim"):
        kept = tuple(f"k{n}" if n in summed else x for n, x in enumerate(letters))
    both = [product.args[0], product.args[1]]
    terms = tuple((x, letters[rank - len(shape_of(x)) :]) for x in both if isinstance(x, Node))
    form = Product(node, terms, kept, factor, (*inner, node), product)
    return form if len(terms) == 2 and all(_is_shared(form, x) for x in letters if x not in kept) else None


def _multiplied(node: Node) -> tuple[Node | None, float, tuple[Node, ...]]:
    """The product of two tensors at or above `node`, what constants are multiplied onto it, and the nodes passed."""
    factor, inner = 1.0, [node]
    while not writes_after(node, None):
        if operation(node) not in ("mul", "multiply"):
            if not (is_copy(node) or (node.target in CASTS and node.meta["val"].dtype.is_floating_point)):
                break
            node = node.args[0]  # type: ignore[assignment]
        else:
            left, right = node.args[:2]
            tensors = [(a, constant(b)) for a, b in ((left, right), (right, left))]
            scaled = next(((a, n) for a, n in tensors if n is not None and isinstance(a, Node)), None)
            if scaled is None:
                return node, factor, tuple(reversed(inner))
            node, factor = scaled[0], factor * scaled[1]
        inner.append(node)
    return None, 1.0, ()


def _is_shared(form: Product, letter: str) -> bool:
    """Whether a summed letter stands in both terms, or for one element in all."""
    counted = [
        is_one(size)
        for node, letters in form.terms
        for x, size in zip(letters, shape_of(node), strict=True)
        if x == letter
    ]
    return all(counted) or (len(counted) == 2 and not any(counted))


def multiplied_last(form: Product) -> frozenset[int]:
    """The places of the terms that are multiplied onto the finished sums, in the order in which PyTorch multiplies.

    An infinite factor makes NaN of sums that it enters, where the finished sum times infinity is infinite.
    """
    summed = {n for n, (_, letters) in enumerate(form.terms) if any(_is_summed(form, x) for x in letters)}
    groups, last = [{n} for n in range(len(form.terms))], set[int]()
    for a, b in _pairs(form):
        second, first = (groups.pop(n) for n in sorted((a, b), reverse=True))
        last |= next((new for new, old in ((first, second), (second, first)) if summed <= old), set())
        groups.append(first | second)
    return frozenset(last)


def _pairs(form: Product) -> list[tuple[int, int]]:
    """Which two of the tensors that are left are multiplied next; their product becomes the last of them."""
    path = form.node.kwargs.get("path") if form.node.target == aten.einsum.default else None
    if path:
        return list(zip(path[::2], path[1::2], strict=True))  # type: ignore[index, arg-type]
    left = len(form.terms)
    return [(0, 1), *((0, n - 1) for n in range(left - 1, 1, -1))]


def ends_of(space: Space, form: Product, out: Dims) -> tuple[End, ...]:
    """The terms with their dimensions, given those of the result; summed letters become fresh axes."""
    known: dict[str, Axes] = dict(zip(form.out, out, strict=True))
    for node, letters in form.terms:
        for letter, size in zip(letters, shape_of(node), strict=True):
            if not known.get(letter):
                known[letter] = space.fresh(size)
    user = form.user or form.node
    return tuple(End(node, _dims(node, letters, known), user) for node, letters in form.terms)


def _dims(node: Node, letters: Letters, known: dict[str, Axes]) -> Dims:
    """A dimension of size 1 is broadcast: it has no axis, whatever its letter stands for elsewhere."""
    return tuple(() if is_one(size) else known[x] for x, size in zip(letters, shape_of(node), strict=True))


def _is_plain(terms: Sequence[tuple[Node, Letters]], out: Letters) -> bool:
    """No letter twice in one term, and each summed letter in at least two."""
    letters = [x for _, term in terms for x in term]
    if any(len(set(term)) != len(term) for _, term in terms) or len(set(out)) != len(out):
        return False
    return set(out) <= set(letters) and all(x in out or letters.count(x) > 1 for x in letters)
