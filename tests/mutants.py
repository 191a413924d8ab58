"""Small changes to graphs of attention, any of which may change what it computes: what a reader must not overlook."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten
T = TypeVar("T")

#: Picks one of n: 0 <= choose(n) < n.
Choose = Callable[[int], int]
Operator = Callable[[Graph, Choose], None]


class NoPlace(Exception):  # noqa: N818 - a mutation that this graph has no place for
    """The graph has no place for this mutation."""


OPERATORS: dict[str, Operator] = {}


def operator(change: Operator) -> Operator:
    """Adds the function to OPERATORS."""
    OPERATORS[change.__name__] = change
    return change


def mutate(module: GraphModule, name: str, choose: Choose) -> None:
    """Applies the named operator at a place that `choose` picks. Raises NoPlace; the graph may not run afterwards."""
    OPERATORS[name](module.graph, choose)
    module.graph.lint()
    module.recompile()


# --- places ---


def pick(options: Sequence[T], choose: Choose) -> T:
    """One of the options. Raises NoPlace if there is none."""
    if not options:
        raise NoPlace
    return options[choose(len(options))]


def calls(graph: Graph) -> list[Node]:
    """The operations that the result needs."""
    needed: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or any(user in needed for user in node.users) or _writes(node):
            needed.add(node)
    return [n for n in graph.nodes if n.op == "call_function" and n in needed]


def _writes(node: Node) -> bool:
    return bool(getattr(getattr(node.target, "_schema", None), "is_mutable", False))


def value(node: object) -> Tensor | None:
    """The tensor that a node makes, as it was traced."""
    made = node.meta.get("val") if isinstance(node, Node) else None
    return made if isinstance(made, Tensor) else None


def tensors(graph: Graph, wanted: Callable[[Tensor], bool] = lambda _: True) -> list[Node]:
    """Inputs and results of operations of the wanted kind that something uses."""
    nodes = [*(n for n in graph.nodes if n.op == "placeholder" and n.users), *calls(graph)]
    return [n for n in nodes if (made := value(n)) is not None and wanted(made)]


def floats(graph: Graph) -> list[Node]:
    return tensors(graph, lambda t: t.is_floating_point())


def conditions(graph: Graph) -> list[Node]:
    return tensors(graph, lambda t: t.dtype == torch.bool)


def shape(node: Node) -> list[int]:
    """The sizes of a tensor as numbers; symbolic ones by their hints."""
    made = value(node)
    assert made is not None
    return [s if isinstance(s, int) else int(s.node.hint) for s in made.shape]


def arguments(graph: Graph) -> Iterator[tuple[Node, int, str, Any]]:
    """(node, place, name, value) of all positional arguments."""
    for node in calls(graph):
        schema = getattr(node.target, "_schema", None)
        names = [a.name for a in schema.arguments] if schema is not None else []
        for place, argument in enumerate(node.args):
            yield node, place, names[place] if place < len(names) else "", argument


def put(node: Node, place: int, argument: Any) -> None:
    """Replaces one positional argument."""
    node.args = (*node.args[:place], argument, *node.args[place + 1 :])


def insert(graph: Graph, after: Node, target: Any, *rest: Any) -> Node:
    """`target(after, *rest)`, used by all that used `after`."""
    with graph.inserting_after(after):
        made = graph.call_function(target, (after, *rest))
    after.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    made.meta["val"] = after.meta.get("val")
    return made


def is_dimension(name: str) -> bool:
    """Whether the argument of this name counts dimensions."""
    return name.startswith(("dim", "axis", "source", "destination")) or name.endswith("_dim")


# --- numbers, operations, operands ---


@operator
def literal(graph: Graph, choose: Choose) -> None:
    """Another number: a scale, a fill, a cap, a rate."""
    places = [(n, i, a) for n, i, name, a in arguments(graph) if type(a) is float and not is_dimension(name)]
    node, place, number = pick(places, choose)
    put(node, place, pick([1.5 * number, -number, 0.5 * number, number + 1, 0.0], choose))


@operator
def offset(graph: Graph, choose: Choose) -> None:
    """One more or one less: a diagonal, a start, a width, what is compared with."""
    spans = ("size", "shape", "repeats", "split_size", "sizes", "fill_value")
    places = [
        (n, i, a)
        for n, i, name, a in arguments(graph)
        if type(a) is int and not is_dimension(name) and name not in spans
    ]
    node, place, number = pick(_rather(places, _POSITIONS, choose), choose)
    step = pick([1, -1], choose)
    if node.target == aten.arange.default:
        node.target, node.args = aten.arange.start, (step, number + step)
        return
    if node.target == aten.slice.Tensor and all(type(a) is int and a < _LONG for a in node.args[2:4]):
        put(node, 5 - place, node.args[5 - place] + step)  # type: ignore[operator]
    put(node, place, number + step)


#: The end of a slice that goes as far as there is something.
_LONG = 2**60
#: Operations in which a whole number, or a dimension, may change without changing the shape of the result.
_POSITIONS = (
    "arange",
    "tril",
    "triu",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
    "add",
    "sub",
    "rsub",
    "pow",
    "mul",
)
_ALONG = ("softmax", "log_softmax", "cumsum", "logcumsumexp", "flip", "roll", "cumprod")


def _rather(places: list[tuple[Any, ...]], names: tuple[str, ...], choose: Choose) -> list[tuple[Any, ...]]:
    """Mostly those places in operations of these names, if there are any."""
    liked = [p for p in places if str(p[0].target).removeprefix("aten.").split(".")[0].rstrip("_") in names]
    return liked if liked and choose(6) else places


@operator
def dimension(graph: Graph, choose: Choose) -> None:
    """Another dimension, another order of dimensions, or another letter of an einsum."""
    places = [
        (n, i, a)
        for n, i, name, a in arguments(graph)
        if (is_dimension(name) and isinstance(a, int | list | tuple)) or name == "equation"
    ]
    node, place, held = pick(_rather(places, _ALONG, choose), choose)
    rank = max((len(t.shape) for t in map(value, (node, *node.all_input_nodes)) if t is not None), default=1)
    if isinstance(held, str):
        put(node, place, _exchanged(held, choose))
    elif isinstance(held, int):
        put(node, place, pick([d for d in range(rank) if d != held % rank], choose))
    else:
        put(node, place, _swapped(list(held), choose) if len(held) > 1 else [choose(rank)])


def _exchanged(equation: str, choose: Choose) -> str:
    """Two letters change places in one operand or in the result."""
    terms = equation.replace(" ", "").replace("->", ",").split(",")
    at = choose(len(terms))
    letters = [i for i, x in enumerate(terms[at]) if x.isalpha()]
    if len(letters) < 2:
        raise NoPlace
    spots = _swapped(letters, choose)
    changed = list(terms[at])
    for place, source in zip(letters, spots, strict=True):
        changed[place] = terms[at][source]
    terms[at] = "".join(changed)
    return f"{','.join(terms[:-1])}->{terms[-1]}" if "->" in equation else ",".join(terms)


def _swapped(held: list[Any], choose: Choose) -> list[Any]:
    first = choose(len(held))
    second = pick([i for i in range(len(held)) if i != first], choose)
    held[first], held[second] = held[second], held[first]
    return held


_SWAPS = (
    (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.maximum.default),
    (aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor),
    (aten.tril.default, aten.triu.default),
    (aten.triu_.default, aten.tril_.default),
    (aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor, aten.eq.Tensor, aten.ne.Tensor),
    (aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.eq.Scalar, aten.ne.Scalar),
    (aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor),
    (aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor),
    (aten.logical_and.default, aten.logical_or.default, aten.logical_xor.default),
    (aten.softmax.int, aten.log_softmax.int),
    (aten.tanh.default, aten.sin.default, aten.sigmoid.default),
    (aten.exp.default, aten.exp2.default, aten.expm1.default, aten.sigmoid.default),
    (aten.log.default, aten.log2.default, aten.log1p.default),
    (aten.elu.default, aten.relu.default, aten.gelu.default, aten.silu.default, aten.softplus.default),
    (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.logsumexp.default),
    (aten.cumsum.default, aten.cumprod.default, aten.logcumsumexp.default),
    (aten.minimum.default, aten.maximum.default),
)


@operator
def operation(graph: Graph, choose: Choose) -> None:
    """Another operation with the same arguments."""
    places = [(n, group) for n in calls(graph) for group in _SWAPS if n.target in group]
    node, group = pick(places, choose)
    node.target = pick([t for t in group if t != node.target], choose)


_COMMUTE = {
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.eq.Tensor,
    aten.ne.Tensor,
    *(t for g in _SWAPS[6:9] for t in g),
}


@operator
def operand_order(graph: Graph, choose: Choose) -> None:
    """Two operands of one operation change places, or two inputs everywhere."""
    places = [
        (n, i, j)
        for n in calls(graph)
        if n.target not in _COMMUTE
        for j in range(len(n.args))
        for i in range(j)
        if _alike(n.args[i], n.args[j])
    ]
    inputs = [n for n in tensors(graph) if n.op == "placeholder"]
    pairs = [(a, b) for n, a in enumerate(inputs) for b in inputs[:n] if _alike(a, b)]
    if pairs and (not places or choose(2)):
        _exchange(*pick(pairs, choose))
        return
    node, i, j = pick(places, choose)
    first, second = node.args[i], node.args[j]
    put(node, i, second)
    put(node, j, first)


def _alike(a: object, b: object) -> bool:
    """Two different tensors of one shape and dtype."""
    one, other = value(a), value(b)
    if a is b or one is None or other is None:
        return False
    return one.dtype == other.dtype and shape(a) == shape(b)  # type: ignore[arg-type]


def _exchange(a: Node, b: Node) -> None:
    users_a, users_b = list(a.users), list(b.users)
    for user in dict.fromkeys([*users_a, *users_b]):
        swapped = torch.fx.node.map_arg(
            (user.args, user.kwargs), lambda n: b if n is a else a if n is b else n
        )
        user.args, user.kwargs = swapped


@operator
def other_operand(graph: Graph, choose: Choose) -> None:
    """One operand is replaced by an earlier tensor of the same shape."""
    order = {n: k for k, n in enumerate(graph.nodes)}
    places = [
        (n, a, other)
        for n in calls(graph)
        for a in n.all_input_nodes
        for other in tensors(graph)
        if order[other] < order[n] and _alike(a, other)
    ]
    node, old, new = pick(places, choose)
    node.replace_input_with(old, new)


@operator
def left_out(graph: Graph, choose: Choose) -> None:
    """An operation is left out: its first tensor takes its place."""
    sources = ((n, n.args[0]) for n in calls(graph) if n.args and n.target != aten.lift_fresh_copy.default)
    places = [
        (n, s)
        for n, s in sources
        if value(s) is not None and value(n) is not None and shape(n) == shape(s)  # type: ignore[arg-type]
    ]
    node, source = pick(places, choose)
    node.replace_all_uses_with(source)  # type: ignore[arg-type]
    graph.erase_node(node)
