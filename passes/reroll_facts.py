"""What has to be known of a graph to find unrolled loops and chunked forms in it: one walk over all nodes.

Dynamo unrolls Python loops, so a recurrence arrives as a few hundred products, additions and views. They all are
arithmetic on tensors, and what stands around a loop (projections, activations, norms, softmax) is not; that is
how a loop is told from what surrounds it.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.layout import CASTS, COPIES, EXPANDS, RESHAPES, permutation
from attnopt.passes.mask_writes import written_by
from attnopt.passes.reroll_sizes import CONTRACTIONS, TAKES, coupled_sizes, name_of, taken_dim, taken_sizes
from attnopt.passes.sizes import is_one, shape_of
from attnopt.shadow import Shadow

#: Tensors made of nothing but numbers.
MADE = frozenset(
    {
        "zeros", "ones", "full", "arange", "eye", "empty", "new_zeros", "new_ones", "new_full", "new_empty",
        "zeros_like", "ones_like", "full_like", "empty_like", "scalar_tensor", "linspace", "tril_indices",
        "triu_indices",
    }
)  # fmt: skip
COMPARES = frozenset(
    {"lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_not", "bitwise_not"}
)
#: Element by element; each a smooth function wherever it is finite.
SMOOTH = frozenset(
    {
        "add", "sub", "rsub", "mul", "div", "neg", "exp", "exp2", "pow", "sum", "cumsum", "masked_fill", "where",
        "tril", "triu", "cat", "stack", "constant_pad_nd", "pad", "copy", "zero", "fill", "repeat",
        "repeat_interleave", "flip", "addcmul", "multiply", "divide", "subtract", "reciprocal", "cumprod", "log",
        "diff", "roll", "concat", "hstack", "vstack",
    }
)  # fmt: skip
#: Part of known recurrences, but with corners: no finite number of trials says what they compute.
CORNERED = frozenset({"maximum", "minimum", "max", "clamp", "clamp_min", "clamp_max", "abs"})

_VIEWS = RESHAPES | COPIES | EXPANDS | CASTS


def is_view(node: Node) -> bool:
    """Whether the node hands all elements of its first argument on: a reshape, a permutation, a copy, a cast."""
    return node.op == "call_function" and (node.target in _VIEWS or permutation(node) is not None)


def is_arithmetic(node: Node) -> bool:
    """Whether a loop may contain the node."""
    if node.op != "call_function":
        return False
    name = name_of(node)
    known = name in TAKES or name in SMOOTH or name in MADE or name in COMPARES or name in CORNERED
    return known or is_view(node) or (name in CONTRACTIONS and not is_projection(node))


def is_projection(node: Node) -> bool:
    """A product with a matrix that comes into the graph as it is: a linear layer."""
    return any(_is_matrix(x) for x in node.all_input_nodes)


def _is_matrix(node: Node) -> bool:
    while node.op == "call_function" and node.all_input_nodes and is_view(node):
        node = node.all_input_nodes[0]
    value = node.meta.get("val")
    return node.op in ("placeholder", "get_attr") and isinstance(value, Tensor) and value.dim() <= 2


def is_outer(node: Node) -> bool:
    """A product of two tensors each of which is spread along a dimension of the other.

    That of a tensor with itself is none: features of the second degree, of one position.
    """
    if name_of(node) not in ("mul", "multiply"):
        return False
    factors = [x for x in node.args[:2] if isinstance(x, Node) and is_float(x)]
    if len(factors) < 2 or len(set(map(_viewed, factors))) < 2:
        return False
    shapes = [shape_of(x) for x in factors]
    rank = max(map(len, shapes))
    left, right = ((1,) * (rank - len(s)) + s for s in shapes)
    spread = [is_one(a) - is_one(b) for a, b in zip(left, right, strict=True)]
    return 1 in spread and -1 in spread and min(map(len, shapes)) > 1


def _viewed(node: Node) -> Node:
    """The tensor of which a node is a view; symbolic sizes leave slices of everything in the graph."""
    while is_view(node) or (name_of(node) == "slice" and taken_dim(node) is None):
        node = node.all_input_nodes[0]
    return node


def is_product(node: Node) -> bool:
    """Whether the node multiplies tensors with each other over an index, or spreads them into an outer product."""
    return (
        (name_of(node) in CONTRACTIONS and not is_projection(node))
        or is_outer(node)
        or _is_sum_of_products(node)
    )


def _is_sum_of_products(node: Node) -> bool:
    """(a * b).sum(), with a or b spread along a dimension."""
    if name_of(node) != "sum" or not isinstance(node.args[0], Node):
        return False
    inner = node.args[0]
    if name_of(inner) not in ("mul", "multiply") or is_outer(inner):
        return False
    shapes = [shape_of(x) for x in inner.args[:2] if isinstance(x, Node) and is_float(x)]
    return len(shapes) == 2 and min(map(len, shapes)) > 1 and shapes[0] != shapes[1]


def is_float(node: Node) -> bool:
    """Whether the node makes a floating-point tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def is_number(node: Node) -> bool:
    """Whether the node makes a size, or what is computed of sizes."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def storage(node: Node) -> int | None:
    """The memory of the node's value, as a number."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


@dataclass(slots=True)
class Facts:
    """depth: arithmetic node -> products on the longest way up to it. writes: memory -> the nodes that write to it.

    deep: memory -> the depth of what was written into it. makers: memory -> the first node that has it. constant: nodes
    made of numbers. products: nodes that multiply tensors of which none is.

    After `look_closer`, coupled: arithmetic node -> the sizes along which something above it was summed or taken apart;
    written: memory -> those of what was written into it; taken: node -> the sizes of what the node itself takes apart,
    if anything; names and memory: those of arithmetic nodes.
    """

    depth: dict[Node, int] = field(default_factory=dict)
    writes: dict[int, list[Node]] = field(default_factory=lambda: defaultdict(list))
    deep: dict[int, int] = field(default_factory=dict)
    makers: dict[int, Node] = field(default_factory=dict)
    constant: set[Node] = field(default_factory=set)
    products: set[Node] = field(default_factory=set)
    coupled: dict[Node, frozenset[int]] = field(default_factory=dict)
    written: dict[int, frozenset[int]] = field(default_factory=dict)
    taken: dict[Node, frozenset[int]] = field(default_factory=dict)
    names: dict[Node, str] = field(default_factory=dict)
    memory: dict[Node, int | None] = field(default_factory=dict)

    @classmethod
    def of(cls, shadow: Shadow) -> "Facts":
        """One walk over the graph."""
        facts = cls()
        for node in shadow.nodes:
            if node.op == "call_function" and (node in shadow.live) and is_arithmetic(node):
                facts._meet(node)
        return facts

    def _meet(self, node: Node) -> None:
        if all(n in self.constant or is_number(n) for n in node.all_input_nodes):
            self.constant.add(node)
        given = sum(is_float(n) and n not in self.constant for n in node.all_input_nodes)
        if is_product(node) and (given > 1 or name_of(node) == "sum"):
            self.products.add(node)
        depth = max((self.depth_of(n) for n in node.all_input_nodes), default=0) + (node in self.products)
        if depth and name_of(node) == "pow":
            return  # a power of products is the beginning of a norm, not part of a recurrence
        self.depth[node] = depth
        held = storage(node)
        target = written_by(node)
        if target is not None and (memory := storage(target)) is not None:
            self.writes[memory].append(node)
            self.deep[memory] = max(self.deep.get(memory, 0), depth)
        elif held is not None:
            self.makers.setdefault(held, node)

    def look_closer(self) -> None:
        """A second walk, for graphs in which there is something to find."""
        into = {node: memory for memory, nodes in self.writes.items() for node in nodes}
        for node in self.depth:
            self.names[node], self.memory[node] = name_of(node), storage(node)
            if sizes := taken_sizes(node):
                self.taken[node] = sizes
            self.coupled[node] = self._coupled(node)
            if node in into:
                before = self.written.get(into[node], frozenset())
                self.written[into[node]] = before | self.coupled[node]

    def _coupled(self, node: Node) -> frozenset[int]:
        """Nodes mostly have the set of one of their inputs, and share it."""
        total = frozenset() if node in self.constant else coupled_sizes(node)
        for source in node.all_input_nodes:
            above = self.coupled_above(source)
            total = above if total <= above else total | above
        return total

    def coupled_above(self, node: Node) -> frozenset[int]:
        """Sizes along which elements may depend on one another, writes to the node's memory included."""
        held = storage(node)
        above = self.coupled.get(node, frozenset())
        later = self.written.get(held, frozenset()) if held is not None else frozenset()
        return above | later if later else above

    def depth_of(self, node: Node) -> int:
        """Products above a value, writes to its memory included."""
        held = storage(node)
        return max(self.depth.get(node, 0), self.deep.get(held, 0) if held is not None else 0)

    def writes_to(self, node: Node) -> list[Node]:
        """The nodes that write to the memory of `node`."""
        held = storage(node)
        return self.writes.get(held, []) if held is not None else []
