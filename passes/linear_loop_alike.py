"""Which dimensions of the tensors of a graph are one and the same, and of which of them all elements are needed."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.sizes import Size, hint, is_one, same, shape_of

#: One dimension of one tensor.
Spot = tuple[Node, int]
#: Tensors that have other sizes in a trial than in the graph.
Shapes = Mapping[Node, tuple[int | torch.SymInt, ...]]

#: The fewest elements: one that is read in the place of another shows.
FEWEST = 2


def shape(node: Node) -> tuple[Size, ...]:
    """The sizes of a tensor; () for anything else."""
    return shape_of(node) if isinstance(node.meta.get("val"), Tensor) else ()


@dataclass(slots=True)
class Alike:
    """Which dimensions are one. above: towards the first of them. kept: those of which all elements are needed."""

    above: dict[Spot, Spot] = field(default_factory=dict)
    kept: set[Spot] = field(default_factory=set)

    def first(self, spot: Spot) -> Spot:
        """What all dimensions that are one with this one have in common."""
        while (higher := self.above.get(spot, spot)) != spot:
            self.above[spot] = self.above.get(higher, higher)
            spot = higher
        return spot

    def join(self, one: Spot, other: Spot) -> None:
        """Declares two dimensions one; those of size 1 are broadcast, and say nothing."""
        a, b = _size(one), _size(other)
        if is_one(a) or is_one(b):
            return
        if not same(a, b):
            self.keep_spots((one, other))
        one, other = self.first(one), self.first(other)
        if one != other:
            self.above[other] = one
            if other in self.kept:
                self.kept.add(one)

    def keep_spots(self, spots: Iterable[Spot]) -> None:
        """Dimensions of which all elements are needed."""
        self.kept.update(map(self.first, spots))

    def keep(self, node: Node, dims: Iterable[int]) -> None:
        """The same, of one tensor."""
        rank = len(shape(node))
        self.keep_spots((node, d % rank) for d in dims)

    def keep_all(self, nodes: Iterable[Node]) -> None:
        """The same, of whole tensors."""
        for node in nodes:
            self.keep(node, range(len(shape(node))))

    def broadcast(self, source: Node, target: Node) -> None:
        """Element by element, sizes aligned at the last dimension."""
        self.broadcast_dims([(source, d) for d in range(len(shape(source)))], target, len(shape(target)))

    def broadcast_dims(self, source: Sequence[Spot], target: Node, rank: int) -> None:
        """The same for some dimensions, with the first `rank` of `target`."""
        for spot, d in zip(reversed(source), reversed(range(rank)), strict=False):
            self.join((target, d), spot)
        self.keep_spots(source[: max(len(source) - rank, 0)])

    def shapes(self, nodes: Iterable[Node]) -> Shapes:
        """The shapes that differ: as many elements as no other dimension has, the fewest where that saves the most."""
        held = [(n, d) for n in nodes for d, size in enumerate(shape(n)) if not is_one(size)]
        elements: Counter[Spot] = Counter()
        for spot in held:
            elements[self.first(spot)] += prod(map(hint, spot[0].meta["val"].shape))
        free = [spot for spot, _ in elements.most_common() if spot not in self.kept]
        cut = {spot: n for spot, n in zip(free, count(FEWEST), strict=False) if n < _seen(spot)}
        found: dict[Node, list[int | torch.SymInt]] = {}
        for spot in held:
            if (first := self.first(spot)) in cut:
                node, d = spot
                found.setdefault(node, list(node.meta["val"].shape))[d] = cut[first]
        return {node: tuple(sizes) for node, sizes in found.items()}


def _size(spot: Spot) -> Size:
    node, d = spot
    return shape(node)[d]


def _seen(spot: Spot) -> int:
    node, d = spot
    return hint(node.meta["val"].shape[d])
