"""Finds unrolled loops and chunked forms: the part of a graph that takes sequences apart, and puts one together again.

A region ends with one tensor that has a sequence dimension and begins where sequences are still whole: with the last
tensors before slices, views by chunk, running sums and products between positions. What lies in between is arithmetic,
a few operations a block or a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch.fx import Node

from attnopt.passes.reroll_cut import Cut, Region
from attnopt.passes.reroll_facts import Facts, is_float, is_view
from attnopt.passes.reroll_sizes import name_of, seen_shape
from attnopt.passes.sizes import hint
from attnopt.rule import Reject
from attnopt.shadow import Shadow

#: Ways to see one end of a region, and of these the ones that are tried.
MOST_ROOTS, MOST_TRIALS = 4, 3


@dataclass(frozen=True, slots=True)
class Candidate:
    """One end of arithmetic that may hold a loop: the ways to see it, the likeliest first."""

    sink: Node
    roots: tuple[Node, ...]
    facts: Facts = field(repr=False)


def candidates(shadow: Shadow) -> Iterator[Candidate]:
    """The ends of chains of products in which sequences may be taken apart."""
    facts = Facts.of(shadow)
    seen: set[Node] = set()
    for node in list(facts.depth):
        if facts.depth_of(node) < 2 or not is_float(node) or not _leaves_arithmetic(shadow, facts, node):
            continue
        path = list(_ascend(facts, node))
        if path[-1] not in seen:
            if not seen:
                facts.look_closer()
            seen.add(path[-1])
            yield Candidate(node, _distinct(path), facts)


def numerators(candidate: Candidate) -> Iterator[Candidate]:
    """What the end of a candidate divides or multiplies, where that is made of products as the other factor is."""
    top, facts = candidate.roots[0], candidate.facts
    if name_of(top) not in ("mul", "div"):
        return
    for node in dict.fromkeys(top.all_input_nodes):
        if facts.depth_of(node) > 1 and seen_shape(node) == seen_shape(top):
            yield Candidate(node, _distinct(list(_ascend(facts, node))), facts)


def _leaves_arithmetic(shadow: Shadow, facts: Facts, node: Node) -> bool:
    return node in shadow.results or any(user not in facts.depth for user in shadow.users(node))


def _ascend(facts: Facts, node: Node) -> Iterator[Node]:
    """From the end upwards, past what is done to each position of the output by itself."""
    while True:
        yield node
        deep = [n for n in dict.fromkeys(node.all_input_nodes) if facts.depth_of(n) == facts.depth_of(node)]
        others = [n for n in node.all_input_nodes if facts.depth_of(n) > 0 and n not in deep]
        if len(deep) != 1 or others or not _is_pointwise(node) or node in facts.products:
            return
        node = deep[0]


def _is_pointwise(node: Node) -> bool:
    return is_view(node) or name_of(node) in ("add", "sub", "mul", "div", "neg", "slice", "cat", "stack")


def _distinct(path: Sequence[Node]) -> tuple[Node, ...]:
    """The highest node, and those below it that have other dimensions."""
    kept: list[Node] = []
    for node in reversed(path):
        if not kept or seen_shape(node) != seen_shape(kept[-1]):
            kept.append(node)
    return tuple(kept[:MOST_ROOTS])


def regions(shadow: Shadow, candidate: Candidate) -> list[Region]:
    """The regions that may end at a candidate: few tensors that enter, and long sequences, are the likely ones.

    Raises Reject if there is none for a reason.
    """
    found: list[Region] = []
    reasons: list[Reject] = []
    for root in candidate.roots:
        for dim in range(len(seen_shape(root)) - 1):
            try:
                region = Cut(shadow, candidate.facts, root, dim).region()
            except Reject as reject:
                reasons.append(reject)
                continue
            found += [] if region is None else [region]
    if reasons and not found:
        raise reasons[0]
    found = [r for r in found if not r.leaks] or found
    likely = sorted(found, key=lambda r: (len(r.leaves), -hint(r.root.meta["val"].shape[r.dim])))
    return likely[:MOST_TRIALS]
