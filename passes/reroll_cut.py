"""Cuts one region out of a graph: from its last tensor upwards to where sequences are still whole."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.fx import Node

from attnopt.buffers import BUFFER
from attnopt.passes.mask_writes import arguments
from attnopt.passes.reroll_facts import MADE, Facts, is_number
from attnopt.passes.reroll_pads import PADS, can_be_tried, fills_up
from attnopt.passes.reroll_sizes import seen_shape, summed_sizes, taken_dim
from attnopt.passes.reroll_state import used_outside
from attnopt.passes.sizes import shape_of
from attnopt.rule import Reject
from attnopt.shadow import Shadow

#: More nodes than an unrolled loop may have: a check of it would cost more than it saves.
BUDGET = 6000
TOO_LONG = (
    f"an unrolled loop of more than {BUDGET} operations is not read: compile a shorter one, or use chunks"
)
#: More tensors than enter a linear attention, tables of decays included.
MOST_LEAVES = 16


@dataclass(frozen=True, slots=True)
class Region:
    """nodes: what is computed between the leaves and the root, in order, constants included. mixed: those that hold
    parts or sums of sequences. length: of the sequence. state: the last state, where it is used outside. leaks: inner
    values that are used outside, where they are more than that.
    """

    root: Node
    nodes: tuple[Node, ...]
    mixed: frozenset[Node]
    leaves: tuple[Node, ...]
    dim: int
    length: int
    numbers: tuple[Node, ...] = ()  # nodes that hold sizes
    state: Node | None = None
    leaks: tuple[Node, ...] = ()


class Cut:
    """One region, given its root and sequence dimension."""

    def __init__(self, shadow: Shadow, facts: Facts, root: Node, dim: int) -> None:
        self.shadow, self.facts, self.root, self.dim = shadow, facts, root, dim
        self.length, self.size = seen_shape(root)[dim], shape_of(root)[dim]
        self.lengths: set[int] = {self.length} - {1}
        self.outside: set[Node] = set()
        self.numbers: set[Node] = set()
        self.met: set[int] = set()

    def region(self) -> Region | None:
        """None where no sequence is taken apart in this way."""
        if self.length not in {1, *self.facts.coupled_above(self.root)}:
            return None  # positions do not meet
        found = self._region([self.root])
        if found is None:
            return None
        ends = used_outside(self.shadow, self.facts, found)
        if len(ends) != 1:
            return replace(found, leaks=ends)
        (state,) = ends
        if state in found.nodes:
            return replace(found, state=state)
        self.outside.clear()
        self.numbers.clear()
        wider = self._region([self.root, state])
        return None if wider is None else replace(wider, state=state)

    def _region(self, ends: list[Node]) -> Region | None:
        inside = self._climb(ends)
        order = sorted(inside, key=self.shadow.order.__getitem__)
        data = self._reached(order, lambda n: n in self.outside)
        mixed = self._reached(order, lambda n: n in data and self._mixes(n))
        leaves = self._leaves(set(order), data, mixed)
        if self.root not in mixed or not 3 <= len(leaves) <= MOST_LEAVES:
            return None
        needed = self._needed(ends, leaves)
        nodes = tuple(n for n in order if n in needed)
        if not inside >= needed - self.numbers:
            return None  # something enters that is no leaf
        if not self._is_loop(nodes, leaves):
            return None
        ordered = tuple(sorted(leaves, key=self.shadow.order.__getitem__))
        known = frozenset(mixed).intersection(nodes)
        return Region(self.root, nodes, known, ordered, self.dim, self.length, tuple(needed & self.numbers))

    def _climb(self, ends: list[Node]) -> set[Node]:
        """Everything above the ends up to whole sequences and to what is no arithmetic (`outside`)."""
        self.met.clear()
        inside: set[Node] = set()
        pending = list(ends)
        while pending:
            node = pending.pop()
            if node in inside or node in self.outside:
                continue
            if is_number(node):
                self.numbers.add(node)
                continue
            if node not in self.facts.depth or self._fills_up(node):
                self.outside.add(node)
                continue
            inside.add(node)
            if len(inside) > BUDGET:
                raise Reject(TOO_LONG, self.root, 2)
            self._widen(node)
            pending += self._writes(node)
            whole = self._takes_apart(node)
            for source in node.all_input_nodes:
                if source is whole:
                    self.outside.add(self._through_nothing(source, inside))
                else:
                    pending.append(source)
        self.outside -= inside
        return inside

    def _through_nothing(self, node: Node, inside: set[Node]) -> Node:
        """Upwards past slices of everything, of which each turn of a loop has its own."""
        while node in self.facts.depth and self._name(node) in ("slice", "alias") and taken_dim(node) is None:
            inside.add(node)
            node = node.all_input_nodes[0]
        return node

    def _writes(self, node: Node) -> list[Node]:
        """Writes to the memory of `node`, once for all nodes that share it."""
        held = self.facts.memory.get(node)
        if held is None or held in self.met:
            return []
        self.met.add(held)
        return self.facts.writes.get(held, [])

    def _name(self, node: Node) -> str:
        return self.facts.names.get(node, "")

    def _widen(self, node: Node) -> None:
        """Padding makes a sequence longer: lengths before and after it count positions alike."""
        if self._name(node) not in (*PADS, "slice") or self.length == 1:
            return
        before, after = seen_shape(node.all_input_nodes[0]), seen_shape(node)
        at = [d for d, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        if len(at) != 1:
            return
        if self._name(node) == "slice":
            if (
                self.facts.depth_of(node) > 1
                and after[at[0]] in self.lengths
                and arguments(node)["start"] in (0, None)
            ):
                self.lengths.add(before[at[0]])
        elif after[at[0]] in self.lengths:
            self.lengths.add(before[at[0]])

    def _takes_apart(self, node: Node) -> Node | None:
        """The whole sequence of which `node` takes a part; None where it takes none, or where that was assembled."""
        if not node.all_input_nodes:
            return None
        source = node.all_input_nodes[0]
        if source not in self.facts.depth and source.op == "call_function":
            return source
        if (
            not self._splits(node)
            or self.facts.writes_to(source)
            or not isinstance(source.meta.get("val"), Tensor)
        ):
            return None
        if self.facts.depth_of(source) > 0 or self._name(source) in ("cumsum", *PADS):
            return None
        return None if self._name(source) in MADE else source

    def _splits(self, node: Node) -> bool:
        """Whether `node` takes apart a dimension that counts positions."""
        sizes = self.facts.taken.get(node)
        return sizes is not None and not self.lengths.isdisjoint(sizes)

    def _mixes(self, node: Node) -> bool:
        """Whether the node makes one position depend on others, or takes positions apart."""
        if node in self.facts.products or self._splits(node) or (self.facts.writes_to(node)):
            return True
        if self._name(node) == "cumsum":
            return self.length == 1 or seen_shape(node)[arguments(node)["dim"]] in self.lengths
        if self._name(node) in PADS and not self._fills_up(node):
            pairs = zip(seen_shape(node), seen_shape(node.all_input_nodes[0]), strict=True)
            return any(a in self.lengths and a != b for a, b in pairs)
        return False

    def _fills_up(self, node: Node) -> bool:
        """Whether the node pads a whole sequence to the root's own length: then that is the sequence."""
        return self.facts.depth_of(node) == 0 and fills_up(node, self.size)

    def _reached(self, order: Iterable[Node], begins: Callable[[Node], bool]) -> set[Node]:
        """Nodes that begin something, or come after one that does; through memory that is written to as well."""
        found: set[Node] = {n for n in self.outside if begins(n)}
        memory: set[int] = set()
        for node in order:
            held = self.facts.memory.get(node)
            if begins(node) or any(n in found for n in node.all_input_nodes) or held in memory:
                found.add(node)
                if held is not None and self.facts.writes.get(held):
                    memory.add(held)
                    found.add(self.facts.makers.get(held, node))
        return found

    def _leaves(self, inside: set[Node], data: set[Node], mixed: set[Node]) -> set[Node]:
        """The last whole tensors; of tensors that have no sequence dimension, such as decays, the first."""
        leaves = {
            self._through_nothing(source, inside)
            for node in inside & mixed
            for source in node.all_input_nodes
            if source in data and source not in mixed and isinstance(source.meta.get("val"), Tensor)
        }
        pending = [n for n in leaves if n in inside and self._begins_above(n)]
        while pending:
            lower = pending.pop()
            leaves.discard(lower)
            above = [n for n in lower.all_input_nodes if n in data and isinstance(n.meta.get("val"), Tensor)]
            fresh = [n for n in above if n not in leaves]
            leaves.update(fresh)
            pending += [n for n in fresh if n in inside and self._begins_above(n)]
        return self._without_derived(leaves, inside, data)

    def _begins_above(self, node: Node) -> bool:
        """Whether a leaf is better looked for above: a decay without positions, a table cut to the length."""
        if self._has_no_length(node) or self.length == 1:
            return self.length != 1
        dim = taken_dim(node)
        return self._name(node) == "slice" and dim is not None and seen_shape(node)[dim] in self.lengths

    def _has_no_length(self, node: Node) -> bool:
        return self.length != 1 and not self.lengths.intersection(seen_shape(node))

    def _without_derived(self, leaves: set[Node], inside: set[Node], data: set[Node]) -> set[Node]:
        """A leaf that is computed from another leaf belongs to the region."""
        while True:
            above = {leaf: self._ancestors(leaf, inside) for leaf in leaves if leaf in inside}
            derived = [leaf for leaf, seen in above.items() if seen & leaves - {leaf}]
            if not derived:
                return leaves
            for leaf in derived:
                leaves = leaves - {leaf} | {n for n in leaf.all_input_nodes if n in data}

    def _ancestors(self, node: Node, inside: set[Node]) -> set[Node]:
        seen: set[Node] = set()
        pending = [node]
        while pending:
            for source in pending.pop().all_input_nodes:
                if source not in seen:
                    seen.add(source)
                    if source in inside:
                        pending.append(source)
        return seen

    def _needed(self, ends: list[Node], leaves: set[Node]) -> set[Node]:
        """Nodes between the leaves and the ends, with the constants that they take."""
        self.met.clear()
        seen: set[Node] = set()
        pending = list(ends)
        while pending:
            node = pending.pop()
            if node in seen or node in leaves:
                continue
            seen.add(node)
            if is_number(node):
                self.numbers.add(node)
                continue
            pending += [*node.all_input_nodes, *self._writes(node)]
        return seen

    def _is_loop(self, nodes: Sequence[Node], leaves: set[Node]) -> bool:
        """Whether sequences are taken apart here, or several products added; a single product is another rule's."""
        whole = sum(bool(self.lengths.intersection(seen_shape(n))) for n in leaves)
        if (self.length != 1 and whole < 2) or not can_be_tried(leaves, self.length):
            return False
        products = sum(n in self.facts.products for n in nodes)
        if self.length == 1:
            return products > 1 and len(leaves) > 3
        if any(self._splits(n) or self._name(n) in ("cumsum", "copy") for n in nodes):
            return products >= 1
        several = products > 2 or (products > 1 and any(map(self._is_buffer, leaves)))
        return several and any(self.lengths & summed_sizes(n) for n in nodes)

    def _is_buffer(self, node: Node) -> bool:
        """Whether a module holds the tensor: it may be a table of decays, whose values say more than the graph."""
        original = self.shadow.value_of.get(node)
        return node.op == "placeholder" and original is not None and BUFFER in original.meta
