"""What of a loop is used outside it, beside the root: its last state, as a rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch.fx import Node

from attnopt.passes.reroll_facts import Facts, is_number, is_view
from attnopt.shadow import Shadow


class Inside(Protocol):
    """What is looked at of a region (passes.reroll_cut.Region)."""

    @property
    def root(self) -> Node: ...
    @property
    def nodes(self) -> Sequence[Node]: ...
    @property
    def mixed(self) -> frozenset[Node]: ...
    @property
    def leaves(self) -> Sequence[Node]: ...


def used_outside(shadow: Shadow, facts: Facts, region: Inside) -> tuple[Node, ...]:
    """What is computed in a region and used outside, beside the root, in order: the last state, if it is one node."""
    return _Ends(shadow, facts, region.root).find(set(region.nodes), set(region.mixed), set(region.leaves))


@dataclass(frozen=True, slots=True)
class _Ends:
    shadow: Shadow
    facts: Facts
    root: Node

    def find(self, inside: set[Node], mixed: set[Node], leaves: set[Node]) -> tuple[Node, ...]:
        followers = self._followers(inside, mixed, leaves)
        known = inside | followers
        exits = [
            n for n in known if n in mixed | followers and n is not self.root and self._is_used(n, known)
        ]
        tops = {self._top(n, mixed | followers) for n in exits}
        tops.discard(self.root)
        return tuple(sorted(tops, key=self.shadow.order.__getitem__))

    def _is_used(self, node: Node, known: set[Node]) -> bool:
        return node in self.shadow.results or any(user not in known for user in self.shadow.users(node))

    def _followers(self, inside: set[Node], mixed: set[Node], leaves: set[Node]) -> set[Node]:
        """What follows from inner values, other than the root, by arithmetic on them and on the leaves."""
        after: set[Node] = set()
        pending = [u for n in inside & mixed if n is not self.root for u in n.users]
        while pending:
            node = pending.pop()
            fits = (
                node in self.shadow.live
                and node in self.facts.depth
                and node not in inside
                and node not in after
            )
            if fits and self._is_closed(node, inside | after | leaves):
                after.add(node)
                pending += list(node.users)
        return after

    def _is_closed(self, node: Node, known: set[Node]) -> bool:
        """Whether all that the node takes comes from here; slices of leaves and decays do."""
        pending, seen = list(node.all_input_nodes), set()
        while pending:
            source = pending.pop()
            if (
                source in known
                or source in seen
                or source.op in ("placeholder", "get_attr")
                or is_number(source)
            ):
                continue
            if source not in self.facts.depth or self.facts.depth_of(source) > 1:
                return False
            seen.add(source)
            pending += source.all_input_nodes
        return True

    def _top(self, node: Node, mixed: set[Node]) -> Node:
        """The node upwards of which more than a view is made of inner values."""
        while is_view(node) and node.all_input_nodes[0] in mixed:
            node = node.all_input_nodes[0]
        return node
