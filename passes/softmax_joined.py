"""Scores that are a sum of products, q1 k1^T + q2 k2^T, as one product: of the features of all, side by side.

Multi-head latent attention adds the product of the positional parts, whose keys all heads share, to that of the others
(arXiv 2405.04434, equations 14 to 17). Read as a bias, the second product would be a tensor of all pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import inf

from torch.fx import Node

from attnopt.passes.layout import Axes, Dims, Space
from attnopt.passes.scores import ScoreReader
from attnopt.passes.scores_factors import on_operands
from attnopt.passes.site import Operand, Roles, flat, peel
from attnopt.passes.terms import Scores, Term
from attnopt.rule import Reject
from attnopt.shadow import Shadow


@dataclass(frozen=True, slots=True)
class Product:
    """A term of the logits that is itself a product; scores: how, with everything that multiplies it."""

    term: Term
    scores: Scores


@dataclass(frozen=True, slots=True)
class Joined:
    """scores: without the terms that became features; q, k: those features; path: inner nodes of their products.

    width: the axes of the features.
    """

    scores: Scores
    width: Axes = ()
    q: tuple[Operand, ...] = ()
    k: tuple[Operand, ...] = ()
    path: frozenset[Node] = frozenset()


def products(space: Space, shadow: Shadow, scores: Scores) -> tuple[Product, ...]:
    """The terms that are products and nothing else. Before the roles are told, since reading may split axes."""
    return tuple(_products(space, shadow, scores))


def _products(space: Space, shadow: Shadow, scores: Scores) -> Iterator[Product]:
    for term in scores.terms:
        given = Scores(term.factor, factors=term.times)
        try:
            found = ScoreReader(space, shadow).read(term.node, term.dims, given)
        except Reject:
            continue
        capped = scores.softcap is not None or found.softcap is not None
        plain = not (capped or found.fills or found.terms or found.blocks or found.shift)
        alike = found.factors[: len(scores.factors)] == scores.factors == term.times
        finite = [
            fill for fill in scores.fills if fill.value != -inf
        ]  # what is added to it would still be seen
        under = any(fill.at is None or term.at is None or fill.at < term.at for fill in finite)
        if plain and alike and not under:
            yield Product(term, found)


def join(space: Space, roles: Roles, scores: Scores, found: tuple[Product, ...], scale: float) -> Joined:
    """The scores with those products as further features that pair queries with keys as the first product does.

    scale: that of the first product; the others are told relative to it. With a single query they stay biases: that
    is one row, and putting all keys side by side costs more.
    """
    joined = Joined(scores)
    for product in found if roles.query and scale and not scores.rsqrt else ():
        pair = _features(space, roles, product.scores, len(scores.factors))
        if pair is None:
            continue
        q, k = pair
        q = replace(q, factor=q.factor / scale)
        rest = tuple(term for term in joined.scores.terms if term is not product.term)
        joined = Joined(
            replace(joined.scores, terms=rest), (*joined.width, *(q.layout or ((),))[-1]),
            (*joined.q, q), (*joined.k, k), joined.path | {*product.scores.path},
        )  # fmt: skip
    return joined


def _features(space: Space, roles: Roles, scores: Scores, shared: int) -> tuple[Operand, Operand] | None:
    """q and k of one product, scaled as it is; None where they do not vary as those of the site do.

    shared: how many of its factors multiply the first product as well.
    """
    sides = [peel(space, node, dims) for node, dims in _sides(scores)]
    if {*roles.key} & {*flat(space, sides[0][1])}:
        sides.reverse()
    (q_node, q_dims, q_factor), (k_node, k_dims, k_factor) = sides
    width = tuple(a for a in flat(space, q_dims) if a in flat(space, k_dims) and a not in _of(roles))
    of_queries = {*roles.batch, *roles.heads, *roles.query, *width}
    of_keys = {*roles.batch, *roles.kv_heads, *roles.key, *width}
    fits = {*flat(space, q_dims)} <= of_queries and {*flat(space, k_dims)} <= of_keys
    if not width or not fits or not {*roles.key} <= {*flat(space, k_dims)}:
        return None
    try:
        times, key_times = on_operands(space, roles, scores.factors[shared:])
    except Reject:
        return None
    scale = scores.scale * q_factor * k_factor
    return (
        Operand(q_node, space.resolve(q_dims), scale, times, layout=(*roles.layout("q")[:-1], width)),
        Operand(k_node, space.resolve(k_dims), times=key_times, layout=(*roles.layout("k")[:-1], width)),
    )


def _sides(scores: Scores) -> Iterator[tuple[Node, Dims]]:
    if scores.form is not None:
        yield scores.form.lhs, scores.q
        yield scores.form.rhs, scores.k


def _of(roles: Roles) -> Axes:
    return (*roles.batch, *roles.heads, *roles.query, *roles.key, *roles.dv)
