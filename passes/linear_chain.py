"""Walks upwards from an operand of a product to another product: what multiplies, divides or zeroes it on the way."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor
from torch.fx import Node

from attnopt.passes.constants import constant
from attnopt.passes.layout import CASTS, Axes, Dims, Space, broadcast_up, is_copy, step_up
from attnopt.passes.linear_product import End, Product, ends_of, plain_product_of, product_of
from attnopt.passes.linear_strange import reason_for
from attnopt.passes.mask_writes import arguments, operation
from attnopt.passes.sizes import shape_of
from attnopt.rule import Reject

#: More nodes than anybody puts between and beside two products of one attention.
LARGEST = 64


@dataclass(frozen=True, slots=True)
class Gate:
    """A condition that decides where a value is kept and where it becomes 0; `hides`: True means 0.

    user: the node that reads it.
    """

    node: Node
    dims: Dims
    hides: bool
    user: Node


@dataclass(frozen=True, slots=True)
class Triangle:
    """tril or triu of a value: kept where column - row is at most (lower) or at least `diagonal`, else 0."""

    rows: Axes
    columns: Axes
    diagonal: Any  # an int, or a node that holds a size
    lower: bool


@dataclass(frozen=True, slots=True)
class Weighting:
    """value = scale * (product of tensors) * factors / divisors, and 0 where a gate or a triangle says so.

    outer: tensors that are multiplied onto the product of the weights and the values. path: the nodes that do all this.
    beside: nodes that make the zeros. strange: what was met on the way that no linear attention has, as (reason, node).
    """

    scale: float = 1.0
    factors: tuple[End, ...] = ()
    divisors: tuple[End, ...] = ()
    gates: tuple[Gate, ...] = ()
    triangles: tuple[Triangle, ...] = ()
    path: tuple[Node, ...] = ()
    beside: tuple[Node, ...] = ()
    strange: tuple[tuple[str, Node], ...] = ()
    outer: tuple[End, ...] = ()

    def times(self, number: float) -> "Weighting":
        """The same with a larger scale."""
        return replace(self, scale=self.scale * number)


@dataclass(frozen=True, slots=True)
class Chain:
    """What was found: the inner product, the tensors that enter it, and what is done to it afterwards."""

    form: Product
    ends: tuple[End, ...]
    weighting: Weighting


def read_chain(space: Space, node: Node, dims: Dims, here: Weighting) -> Chain:
    """From `node` upwards to a product; `here` says what the nodes below do. Raises Reject."""
    form = product_of(node)
    here = replace(here, path=(*here.path, *(form.inner if form is not None else (node,))))
    if form is not None:
        return Chain(form, ends_of(space, form, dims), here.times(form.factor))
    if node.target in CASTS and node.meta["val"].dtype.is_floating_point and not is_copy(node):
        return read_chain(space, node.args[0], dims, here)  # type: ignore[arg-type]
    moved = step_up(space, node, dims)
    if moved is not None:
        return read_chain(space, *moved, here)
    steps = [step for step in steps_of(node, dims) if leads_to_product(step.node)]
    if not steps:
        raise Reject("no product above", node, -1)
    return _first(space, steps, here)


def _first(space: Space, steps: "list[Step]", here: Weighting) -> Chain:
    """The first way on that reaches a product."""
    *others, last = steps
    for step in others:
        try:
            return read_chain(space, step.node, step.dims, step.fold(here))
        except Reject:
            continue
    return read_chain(space, last.node, last.dims, last.fold(here))


def leads_to_product(node: Node) -> bool:
    """Whether a product stands above, with nothing in between but what the walk may pass."""
    pending, seen = deque([node]), {node}
    while pending and len(seen) <= LARGEST:
        at = pending.popleft()
        if product_of(at) is not None:
            return True
        if at.op != "call_function" or not isinstance(at.meta.get("val"), Tensor):
            continue
        fresh = [n for n in _above(at) if n not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False


def _above(node: Node) -> list[Node]:
    plain = plain_product_of(node)
    if plain is not None:
        return [term for term, _ in plain.terms]
    if operation(node) in STEPS or operation(node) in STRANGE:
        return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    is_view = node.target in CASTS or is_copy(node) or _is_view(node)
    return [node.args[0]] if is_view else []  # type: ignore[list-item]


def _is_view(node: Node) -> bool:
    dims: Dims = tuple(() for _ in shape_of(node))
    try:
        return step_up(Space(), node, dims) is not None
    except Reject:
        return True  # a view, and one that cannot be followed with these dimensions


@dataclass(frozen=True, slots=True)
class Step:
    """One way on from a node: to which input, with which dimensions, and what the node does to it."""

    node: Node
    dims: Dims
    fold: Callable[[Weighting], Weighting]


def steps_of(node: Node, dims: Dims) -> list[Step]:
    """The ways on through a node that multiplies, divides or zeroes; none if it does something else."""
    name = operation(node)
    if name in STEPS:
        return STEPS[name](node, dims, arguments(node))
    plain = plain_product_of(node)
    if plain is not None:
        return _multiplied(plain, dims)
    if name in STRANGE:
        return _on(node.args[0], dims, lambda w: replace(w, strange=(*w.strange, (reason_for(node), node))))
    return []


def _on(node: Any, dims: Dims, fold: Callable[[Weighting], Weighting]) -> list[Step]:
    if not isinstance(node, Node) or not isinstance(node.meta.get("val"), Tensor):
        return []
    return [Step(node, broadcast_up(dims, shape_of(node)), fold)]


def end_of(given: Node, dims: Dims, user: Node) -> End:
    """A tensor, or a number that depends on sizes, that `user` broadcasts to the dimensions `dims`."""
    value = given.meta.get("val")
    return End(given, broadcast_up(dims, shape_of(given)) if isinstance(value, Tensor) else (), user)


def _mul(node: Node, dims: Dims, held: Mapping[str, Any]) -> list[Step]:
    found: list[Step] = []
    for value, other in ((held["self"], held["other"]), (held["other"], held["self"])):
        number = constant(other)
        if number is not None:
            return _on(value, dims, lambda w, number=number: w.times(number))  # type: ignore[misc]
        if value is other:
            return _on(value, dims, lambda w: replace(w, strange=(*w.strange, (reason_for(node), node))))
        if isinstance(other, Node):
            end = end_of(other, dims, node)
            found += _on(value, dims, lambda w, end=end: replace(w, factors=(*w.factors, end)))  # type: ignore[misc]
    return found


def _multiplied(form: Product, dims: Dims) -> list[Step]:
    """Through each of the terms of a product that sums over nothing; the others are factors."""
    ends, found = ends_of(Space(), form, dims), []
    for value in ends:
        others = tuple(end for end in ends if end is not value)

        def fold(w: Weighting, others: tuple[End, ...] = others) -> Weighting:
            path = (*w.path, *form.inner[:-1])
            return replace(w, scale=w.scale * form.factor, factors=w.factors + others, path=path)

        found.append(Step(value.node, value.dims, fold))
    return found


def _div(node: Node, dims: Dims, held: Mapping[str, Any]) -> list[Step]:
    value, other = held["self"], held["other"]
    if held.get("rounding_mode"):
        return []
    number = constant(other)
    if number is not None:
        return _on(value, dims, lambda w: w.times(1 / number)) if number else []
    end = end_of(other, dims, node)
    return _on(value, dims, lambda w: replace(w, divisors=(*w.divisors, end)))


def _neg(node: Node, dims: Dims, held: Mapping[str, Any]) -> list[Step]:
    del node
    return _on(held["self"], dims, lambda w: w.times(-1.0))


def _masked_fill(node: Node, dims: Dims, held: Mapping[str, Any]) -> list[Step]:
    gate = _gate(held["mask"], dims, node, hides=True)
    return _gated(held["self"], gate, held["value"], dims)


def _where(node: Node, dims: Dims, held: Mapping[str, Any]) -> list[Step]:
    keeps, hides = (_gate(held["condition"], dims, node, hides=hides) for hides in (False, True))
    then, other = held.get("self"), held.get("other")
    return [*_gated(then, keeps, other, dims), *_gated(other, hides, then, dims)]


def _gate(condition: Node, dims: Dims, user: Node, *, hides: bool) -> Gate:
    return Gate(condition, broadcast_up(dims, shape_of(condition)), hides, user)


def _gated(value: Any, gate: Gate, filled: Any, dims: Dims) -> list[Step]:
    if not is_zero(filled):
        return []
    beside = (filled,) if isinstance(filled, Node) else ()
    return _on(value, dims, lambda w: replace(w, gates=(*w.gates, gate), beside=(*w.beside, *beside)))


def is_zero(given: Any) -> bool:
    """Whether a number or a tensor is 0 everywhere."""
    if isinstance(given, Node) and operation(given) in {"zeros", "zeros_like", "new_zeros"}:
        return True
    return constant(given) == 0.0


def _triangle(node: Node, dims: Dims, held: Mapping[str, Any]) -> list[Step]:
    kept = Triangle(dims[-2], dims[-1], held["diagonal"], lower=operation(node) == "tril")
    return _on(held["self"], dims, lambda w: replace(w, triangles=(*w.triangles, kept)))


#: Reads one node: the ways on from it.
Reader = Callable[[Node, Dims, Mapping[str, Any]], list[Step]]

STEPS: Mapping[str, Reader] = MappingProxyType(
    {
        **dict.fromkeys(("mul", "multiply"), _mul),
        **dict.fromkeys(("div", "divide", "true_divide"), _div),
        **dict.fromkeys(("neg", "negative"), _neg),
        **dict.fromkeys(("tril", "triu"), _triangle),
        "masked_fill": _masked_fill,
        "where": _where,
    }
)

#: Passed only to say what stands there. Softmax and exp are other rules' business.
STRANGE = frozenset(
    {
        "relu", "relu6", "sigmoid", "tanh", "silu", "gelu", "elu", "leaky_relu", "softplus", "pow", "square", "abs",
        "sqrt", "add", "sub", "dropout", "feature_dropout", "native_dropout", "sin", "cos", "sign", "clamp", "log",
    }
)  # fmt: skip
