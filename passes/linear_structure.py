"""Finds what could be a linear attention around its last product: the three tensors, and what weighs them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import Node

from attnopt.passes.constants import constant
from attnopt.passes.layout import CASTS, Axis, Dims, Space, step_down
from attnopt.passes.linear_chain import Gate, Weighting, end_of, leads_to_product, read_chain
from attnopt.passes.linear_norm import Divisor, inverse_of, read_divisor
from attnopt.passes.linear_product import (
    End,
    Product,
    ends_of,
    multiplied_last,
    plain_product_of,
    product_of,
)
from attnopt.passes.linear_roles import Base, Trio, cheapest, is_weight, trios
from attnopt.passes.mask_writes import arguments, operation
from attnopt.passes.site import flat
from attnopt.passes.sizes import shape_of
from attnopt.rule import Reject
from attnopt.shadow import Shadow

#: Depth of a Reject once queries, keys and values are told apart: what else reads the same product got less far.
PROVEN = 10

_PER_FEATURE = "a gate for each feature: the state is multiplied by a vector, which no kernel states yet"


@dataclass(frozen=True, slots=True)
class Structure:
    """A product of queries, keys and values: who is who, what weighs them, and where it ends.

    depth: that of a Reject here; -1 where only a proven mask or decay would make this an attention.
    """

    space: Space
    root: Node
    out: Dims
    trio: Trio
    weighting: Weighting
    depth: int

    @property
    def weighed(self) -> frozenset[Axis]:
        """All axes of tensors that weigh pairs of a query and a key."""
        axes = [frozenset(flat(self.space, factor.dims)) for factor in self.weighting.factors]
        pairs = [a for a in axes if a.intersection(self.trio.key) and a.intersection(self.trio.alone)]
        return frozenset[Axis]().union(*pairs)


def structures(shadow: Shadow, anchor: Node) -> Iterator[Structure]:
    """The ways to see an attention that ends with the product `anchor`."""
    form = product_of(anchor)
    if form is None or not anchor.meta["val"].dtype.is_floating_point:
        return
    inner = [place for place, (node, _) in enumerate(form.terms) if leads_to_product(node)]
    for place in [None, *inner] if len(form.terms) > 2 else inner:
        found = _structure(shadow, form, place)
        if found is not None:
            yield found


def _structure(shadow: Shadow, form: Product, place: int | None) -> Structure | None:
    """With the term at `place` expanded to the product that it holds."""
    space = Space()
    out = tuple(space.fresh(size) for size in shape_of(form.node))
    ends, weighting = list(ends_of(space, form, out)), Weighting(form.factor, path=form.inner)
    last = [ends[n] for n in multiplied_last(form)]
    try:
        if place is not None:
            inner = ends.pop(place)
            found = read_chain(space, inner.node, inner.dims, weighting)
            ends, weighting = [*ends, *found.ends], found.weighting
        readings = trios(space, ends, out, lambda: axes_of(space, weighting))
    except Reject:
        return None
    if not readings or not all(b.node.meta["val"].dtype.is_floating_point for b in readings[0].bases):
        return None
    trio = cheapest(readings, space.resolve(out))
    others, outer = (
        tuple(_peeled(b) for b in trio.others if (b.end in last) is late) for late in (False, True)
    )
    scale = weighting.scale
    for base in (*trio.bases, *trio.others):
        scale *= base.factor
    strange = tuple((_PER_FEATURE, base.node) for base in trio.gates)
    weighting = replace(
        weighting,
        scale=scale,
        factors=weighting.factors + others,
        strange=weighting.strange + strange,
        outer=outer,
    )
    depth = PROVEN if _is_plainly_attention(shadow, trio) else -1
    return Structure(space, form.node, out, trio, weighting, depth)


def _peeled(base: Base) -> End:
    return replace(base.end, node=base.node, dims=base.dims)


def _is_plainly_attention(shadow: Shadow, trio: Trio) -> bool:
    """Whether batches or heads are shared, and all three are made of data: two linear layers are no attention."""
    return bool(trio.shared) and not any(is_weight(shadow, base.node) for base in trio.bases)


def axes_of(space: Space, found: Weighting) -> frozenset[Axis]:
    """All axes of what is done to the weights."""
    tensors: list[End | Gate] = [*found.factors, *found.outer, *found.divisors, *found.gates]
    dims = [*(x.dims for x in tensors), *((t.rows, t.columns) for t in found.triangles)]
    return frozenset(a for each in dims for a in flat(space, each))


@dataclass(frozen=True, slots=True)
class Ending:
    """Where a site ends: its last node with the dimensions, nodes from the last product to it, and what divides it.

    weighting: what is done to the weights beside that division. divisor: None where nothing divides.
    """

    root: Node
    out: Dims
    weighting: Weighting
    path: tuple[Node, ...] = ()
    divisor: Divisor | None = None


def endings(shadow: Shadow, found: Structure) -> Iterator[Ending]:
    """The ways to take a division as the normaliser: one that follows, one of the weights, or none."""
    known = dict(found.space.parts)
    below = _division_below(found.space, shadow, found)
    if below is not None:
        yield below
    # What views on that way have split, the pixels into rows and columns, is one axis to the others.
    found.space.parts = known
    weighting = found.weighting
    for place, end in enumerate(weighting.divisors):
        rest = (*weighting.divisors[:place], *weighting.divisors[place + 1 :])
        yield Ending(
            found.root, found.out, replace(weighting, divisors=rest), divisor=read_divisor(found.space, end)
        )
    for end in (*weighting.factors, *weighting.outer):
        inverse = inverse_of(found.space, end)
        if inverse is not None:
            factors, outer = (
                tuple(x for x in xs if x is not end) for xs in (weighting.factors, weighting.outer)
            )
            others = replace(weighting, factors=factors, outer=outer)
            yield Ending(found.root, found.out, others, divisor=inverse)
    yield Ending(found.root, found.out, weighting)


def _division_below(space: Space, shadow: Shadow, found: Structure) -> Ending | None:
    """The division that follows the last product, through views and casts."""
    node, dims, path = found.root, found.out, [found.root]
    while True:
        users = shadow.users(node)
        if len(users) != 1 or node in shadow.results:
            return None
        user = users[0]
        divisor = _division(space, user, node, dims)
        if divisor is not None:
            return Ending(user, dims, found.weighting, tuple(path), divisor)
        moved = _moved(space, user, node, dims)
        if moved is None:
            return None
        node, dims = user, moved
        path.append(node)


def _division(space: Space, user: Node, node: Node, dims: Dims) -> Divisor | None:
    """`user` as node / divisor."""
    plain = plain_product_of(user)
    if plain is not None and len(plain.terms) == 2 and node in dict(plain.terms):
        return _division_by_einsum(space, plain, node, dims)
    if operation(user) not in ("div", "mul") or shape_of(user) != shape_of(node):
        return None
    held = arguments(user)
    other = held["other"] if held["self"] is node else held["self"]
    if not isinstance(other, Node) or other is node or constant(other) is not None:
        return None
    end = end_of(other, dims, user)
    if operation(user) == "mul":
        return inverse_of(space, end)
    return read_divisor(space, end) if held["self"] is node and not held.get("rounding_mode") else None


def _division_by_einsum(space: Space, plain: Product, node: Node, dims: Dims) -> Divisor | None:
    """An einsum without a sum that multiplies `node`, element by element, by the inverse of a divisor."""
    (first, mine), (other, letters) = sorted(plain.terms, key=lambda term: term[0] is not node)
    if first is not node or other is node or mine != plain.out or plain.factor != 1.0:
        return None
    known = dict(zip(mine, dims, strict=True))
    return inverse_of(space, End(other, tuple(known[x] for x in letters), plain.node))


def _moved(space: Space, user: Node, node: Node, dims: Dims) -> Dims | None:
    """The dimensions of a view or a cast of `node`."""
    if user.op != "call_function" or not user.args or user.args[0] is not node:
        return None
    if user.target in CASTS and user.meta["val"].dtype.is_floating_point:
        return dims
    try:
        return step_down(space, user, dims)
    except Reject:
        return None
