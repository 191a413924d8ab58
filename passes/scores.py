"""Reads what lies between Q K^T and the softmax: scales, masks, biases, a cap, casts and views, in any order."""

from collections import Counter
from dataclasses import dataclass, field, replace

from torch.fx import Node

from attnopt.passes.constants import uniform
from attnopt.passes.contraction import Contraction, contraction, label_up, scaled_by_sizes, summed_product
from attnopt.passes.layout import Dims, Space, step_up
from attnopt.passes.mask_writes import writes_after
from attnopt.passes.scores_blocks import Base, refused_write, written
from attnopt.passes.scores_moves import Move, settled
from attnopt.passes.scores_parts import part_moves
from attnopt.passes.scores_steps import added_term, moves
from attnopt.passes.terms import Scores, Term
from attnopt.rule import Reject
from attnopt.shadow import Shadow

#: A longer chain is no attention that somebody wrote down.
LONGEST = 200
#: A node that may hold the scores is read in so many ways at most, however the graph forks.
MOST_WAYS = 4


@dataclass(frozen=True, slots=True)
class ScoreReader:
    """Walks from the softmax upwards; each step folds one node into a Scores. ways: how often each node was read.

    Other users of a value on the way do not matter here: whether they keep it from being replaced is for the site.
    weights, values: the dimensions of the softmax, and of what it weighs, where they are known. base: where else
    reading ends. reader: the first that takes the exponentials of the scores.
    """

    space: Space
    shadow: Shadow
    ways: Counter[Node] = field(default_factory=Counter)
    weights: Dims = ()
    values: Dims = ()
    base: Base | None = None
    reader: Node | None = None

    def read(self, node: Node, dims: Dims, below: Scores) -> Scores:
        """The scores of which `node` is a part: `below` is what the nodes under it have said."""
        here = replace(below, path=(*below.path, node))
        self._need_readable(node, below)
        reader = below.path[-1] if below.path else self.reader
        if self.base is not None and self.base.ends_at(node, reader):
            return here
        if writes := self._writes(node, below, reader):
            here = self._written(node, dims, below, writes)
        form = contraction(node) or summed_product(node)
        if form is not None and self.base is not None:
            raise Reject("a product is written into a block of the scores", node, len(here.path))
        if form is not None:
            return self._contract(form, dims, here)
        if (scaled := scaled_by_sizes(node)) is not None:
            read = self._contract(scaled[0], dims, here)
            return replace(read, factors=(*read.factors, Term(scaled[1], ())))
        return self._best(self._above(node, dims, here))

    def _need_readable(self, node: Node, below: Scores) -> None:
        depth = len(below.path) + 1
        self.ways[node] += 1
        if depth > LONGEST:
            raise Reject(f"more than {LONGEST} operations between Q K^T and the softmax", node, depth)
        if self.ways[node] > MOST_WAYS:
            raise Reject(f"{node.name} enters the scores in more than {MOST_WAYS} ways", node, depth)

    def _writes(self, node: Node, below: Scores, reader: Node | None) -> list[Node]:
        """Writes to a value before it is read. Raises Reject for one after the softmax has read the scores."""
        early = [] if reader is None else writes_after(node, reader)
        late = [] if below.path else writes_after(node, None)[len(early) :]
        if late:
            raise refused_write(node, late[0], below)
        return early

    def _written(self, node: Node, dims: Dims, below: Scores, writes: list[Node]) -> Scores:
        """With what was written to blocks of `node`."""
        within = ScoreReader(self.space, self.shadow)
        return written(node, dims, below, writes, lambda base: replace(within, base=base).read)

    def _above(self, node: Node, dims: Dims, here: Scores) -> list[Move]:
        try:
            moved = step_up(self.space, node, dims)
        except Reject as reject:
            raise Reject(reject.reason, reject.node, len(here.path)) from None
        if moved is not None:
            return [(*moved, here)]
        return part_moves(self.space, node, dims, here) or moves(node, dims, here)

    def _best(self, ways: list[Move]) -> Scores:
        """Of several operands that may hold the scores, the one whose queries and keys fit the values best."""
        found: list[Scores] = []
        reasons: list[Reject] = []
        for way in ways:
            try:
                found.append(self.read(*way))
            except Reject as reject:
                reasons.append(reject)
        if not found:
            raise max(reasons, key=lambda reject: reject.depth)
        return max(found, key=self._fit)

    def _fit(self, scores: Scores) -> tuple[int, int, int]:
        """Queries and keys have in common what the weights have in common with the values; then, the larger product.

        A product of queries with a tensor of all pairs, say of their distances, pairs nothing: it is a bias.
        """
        weights, values, q, k = (
            {a for axes in self.space.resolve(dims) for a in axes}
            for dims in (self.weights, self.values, scores.q, scores.k)
        )
        lacking, needless = (weights & values) - (q & k), (weights & q & k) - values
        return -len(lacking), -len(needless), sum(len(axes) for axes in scores.q + scores.k)

    def _contract(self, form: Contraction, dims: Dims, here: Scores) -> Scores:
        if not form.node.meta["val"].dtype.is_floating_point:
            raise Reject(
                f"the scores are {form.node.meta['val'].dtype}, not floating point", form.node, len(here.path)
            )
        terms = here.terms
        if form.added is not None and uniform(form.added) != 0:
            here = settled(here)
            terms = (*terms, added_term(form.node, form.added, dims, here, form.added_factor))
        q, k = label_up(self.space, form, dims)
        return replace(here, scale=here.scale * form.factor, terms=terms, form=form, q=q, k=k)
