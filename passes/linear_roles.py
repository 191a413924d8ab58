"""Which of the tensors in a triple product are queries, keys and values, and which axes mean what; told by sharing.

o[i, e] = sum over j and d of q[i, d] k[j, d] v[j, e]: the keys are the tensor that shares a summed axis with each of
the others. Without a mask the same value is, read from the other end, attention over d: then the cheaper order counts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.layout import Axes, Axis, Dims, Space
from attnopt.passes.linear_product import End
from attnopt.passes.site import Roles, flat, peel
from attnopt.passes.sizes import hint
from attnopt.shadow import Shadow, fake_value


@dataclass(frozen=True, slots=True)
class Base:
    """A tensor of the triple product as far up as views, upcasts and constant factors reach."""

    end: End
    node: Node
    dims: Dims
    factor: float
    axes: frozenset[Axis]


@dataclass(frozen=True, slots=True)
class Trio:
    """One reading of a product: its queries, keys and values, the other tensors, and the axes by who has them.

    shared: all of q, k, v and the output. alone: the queries and the output. d, key: summed. dv: values and output.
    """

    q: Base
    k: Base
    v: Base
    others: tuple[Base, ...]
    shared: Axes
    alone: Axes
    d: Axes
    key: Axes
    dv: Axes

    @property
    def bases(self) -> tuple[Base, Base, Base]:
        """Queries, keys and values."""
        return self.q, self.k, self.v

    @property
    def gates(self) -> tuple[Base, ...]:
        """Other tensors that vary along features: the state is multiplied by a vector, or a matrix."""
        features = {*self.d, *self.dv}
        return tuple(base for base in self.others if base.axes & features)


def trios(space: Space, ends: Sequence[End], out: Dims, weighed: Callable[[], frozenset[Axis]]) -> list[Trio]:
    """Every reading of a product with these tensors and this output; `weighed`: axes of what is done to the weights."""
    peeled = [(end, *peel(space, end.node, end.dims)) for end in ends]
    # Peeling one tensor may have split axes of another.
    bases = [
        Base(e, node, space.resolve(d), factor, frozenset(flat(space, d))) for e, node, d, factor in peeled
    ]
    order, also = flat(space, out), weighed()
    found = (_trio(order, chosen) for chosen in permutations(bases) if _is_in_order(bases, chosen[3:]))
    fitting = [t for t in found if t is not None and also <= {*t.shared, *t.alone, *t.key}]
    return [t for t in fitting if not t.gates] or fitting


def _is_in_order(bases: Sequence[Base], others: Sequence[Base]) -> bool:
    """Of all orders of the tensors beside q, k and v only one is looked at."""
    places = [next(n for n, b in enumerate(bases) if b is other) for other in others]
    return places == sorted(places)


def _trio(order: Axes, chosen: Sequence[Base]) -> Trio | None:
    q, k, v, *others = chosen
    out, rest = frozenset(order), frozenset[Axis]().union(*(b.axes for b in others))
    shared = q.axes & k.axes & v.axes & out
    alone = (q.axes & out) - k.axes - v.axes
    d = (q.axes & k.axes) - out - v.axes
    key = (k.axes & v.axes) - out - q.axes
    dv = (v.axes & out) - k.axes - q.axes
    fits = (
        all((alone, d, key, dv))
        and q.axes == shared | alone | d
        and k.axes == shared | key | d
        and v.axes == shared | key | dv
        and out == shared | alone | dv
        and rest <= shared | alone | key | d | dv
    )
    if not fits:
        return None
    by_key = [a for axes in k.dims for a in axes]
    return Trio(
        q, k, v, tuple(others), _sorted(order, shared), _sorted(order, alone), _sorted(by_key, d), _sorted(by_key, key),
        _sorted(order, dv),
    )  # fmt: skip


def _sorted(order: Sequence[Axis], chosen: frozenset[Axis]) -> Axes:
    return tuple(a for a in order if a in chosen)


def cheapest(found: Sequence[Trio], out: Dims) -> Trio:
    """The reading whose state, the product of keys and values, is formed with the least work.

    In a tie, the one whose values give the last dimension of the output.
    """
    return min(found, key=lambda t: (_work(t), not set(out[-1]) & set(t.dv)))


def _work(trio: Trio) -> int:
    lengths = _lengths(trio.bases)
    d, dv, key, alone = (_product(lengths, axes) for axes in (trio.d, trio.dv, trio.key, trio.alone))
    return d * dv * (key + alone)


def _lengths(bases: Sequence[Base]) -> dict[Axis, int]:
    """The length of each axis that is a dimension by itself; symbolic ones as seen while tracing."""
    pairs = [pair for b in bases for pair in zip(b.dims, b.node.meta["val"].shape, strict=True)]
    return {axes[0]: hint(size) for axes, size in pairs if len(axes) == 1}


def _product(lengths: dict[Axis, int], axes: Axes) -> int:
    total = 1
    for axis in axes:
        total *= lengths.get(axis, axis.size if isinstance(axis.size, int) else 128)
    return total


def role_candidates(trio: Trio, paired: frozenset[Axis]) -> Iterator[Roles]:
    """Assignments of roles, likely ones first; `paired` are the axes of tensors that weigh pairs of positions.

    Which of the axes that only queries have counts the queries (the others share key heads), and which shared axes
    are heads, follows from the names of no axis: it is tried what those tensors mean.
    """
    lengths = _lengths(trio.bases)
    queries = sorted(trio.alone, key=lambda a: (a in paired, lengths.get(a, 0)), reverse=True)
    for query in queries:
        share = tuple(a for a in trio.alone if a is not query)
        for heads in _heads(trio.shared, paired):
            batch = tuple(a for a in trio.shared if a not in heads)
            yield Roles(batch, heads, share, (query,), trio.key, trio.d, trio.dv)


def _heads(shared: Axes, paired: frozenset[Axis]) -> list[Axes]:
    weighed = tuple(a for a in shared if a in paired)
    default = shared[-1:] if len(shared) > 1 else ()
    return list(dict.fromkeys((weighed or default, default, shared[-1:], ())))


def is_weight(shadow: Shadow, node: Node) -> bool:
    """Whether a tensor is made of parameters and other fixed matrices alone."""
    pending, seen = [node], {node}
    while pending:
        at = pending.pop()
        if at.op == "placeholder" and not _is_fixed(shadow, at):
            return False
        fresh = [n for n in at.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return True


def _is_fixed(shadow: Shadow, node: Node) -> bool:
    """A parameter, a matrix, or a size. Activations come as stacks of matrices, or as integers."""
    value = node.meta.get("val")
    original = shadow.value_of.get(node)
    if original is not None and isinstance(fake_value(original), torch.nn.Parameter):
        return True
    return not isinstance(value, Tensor) or (value.dtype.is_floating_point and value.dim() <= 2)
