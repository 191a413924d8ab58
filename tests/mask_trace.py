"""Traces plain functions into graphs like the shadow, runs such graphs node by node, and evaluates what was read."""

import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.mask import Mask
from attnopt.passes.mask_bounds import POSITIONS, Role
from attnopt.passes.mask_formula import All, AtMostZero, Call, Data, Fact, Formula, Lag, Same, Some
from attnopt.passes.mask_reader import Value, index_of
from attnopt.passes.mask_rules import reader_for
from attnopt.passes.masks import Leaf, MaskReading
from attnopt.passes.sizes import shape_of


def trace(function: Callable[..., Any], *inputs: Tensor, dynamic: bool = False) -> GraphModule:
    """The pre-dispatch ATen graph of `function`, with fake values; `dynamic`: with symbolic sizes."""
    mode = "symbolic" if dynamic else "fake"
    return make_fx(function, pre_dispatch=True, tracing_mode=mode)(*inputs)


def results(module: GraphModule) -> list[Any]:
    """The nodes that the graph returns."""
    returned = next(n for n in module.graph.nodes if n.op == "output").args[0]
    return list(returned) if isinstance(returned, list | tuple) else [returned]


def inputs_of(module: GraphModule) -> list[Node]:
    """The placeholders in order."""
    return [n for n in module.graph.nodes if n.op == "placeholder"]


class _Recorder(Interpreter):
    """Keeps a copy of each value: a later in-place write must not change what a node had made."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.made: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        """Runs the node and keeps its value."""
        value = super().run_node(n)
        self.made[n] = value.clone() if isinstance(value, Tensor) else value
        return value


def run(module: GraphModule, *inputs: Tensor) -> Mapping[Node, Any]:
    """The value of every node as it was made, and of the results as they are in the end."""
    recorder = _Recorder(module)
    recorder.run(*inputs)
    return recorder.made | {node: recorder.env[node] for node in results(module)}


def dense(
    reading: MaskReading, values: Mapping[Node, Any], sq: int, sk: int, mask: Mask | None = None
) -> Tensor:
    """What a reading, or another of its masks, says is visible; its leaves are taken from the values of a run."""
    operands = {
        name: _canonical(leaf, values[leaf.node], LAYOUTS.get(name.rstrip("0123456789"), "bhij"))
        for name, leaf in reading.leaves.items()
    }
    return (reading.mask if mask is None else mask).dense(sq, sk, operands)


#: The dimensions of operands that are no masks over queries and keys.
LAYOUTS = {"padding": "bj", "query_ids": "bi", "key_ids": "bj"}


def _canonical(leaf: Leaf, value: Tensor, order: str) -> Tensor:
    kept = [role for role in leaf.roles if role is not None]
    value = value.reshape([n for n, role in zip(value.shape, leaf.roles, strict=True) if role is not None])
    value = value.permute([kept.index(role) for role in order if role in kept])
    for place, role in enumerate(order):
        if role not in kept:
            value = value.unsqueeze(place)
    return ~value if leaf.negated else value


def roles_of(value: Tensor) -> tuple[Role | None, ...]:
    """Roles of a mask whose dimensions are the last of (b, h, i, j); None for those of size 1."""
    names: tuple[Role, ...] = ("b", "h", "i", "j")
    aligned = names[len(names) - value.dim() :]
    return tuple(
        None if isinstance(n, int) and n == 1 else role for role, n in zip(aligned, value.shape, strict=True)
    )


@dataclass(frozen=True)
class Interpretation:
    """What the calculus makes of one tensor, and the tensor itself.

    reads_data: whether some of it is data of the graph. own: whether it is just the data of the node itself.
    """

    claimed: Tensor
    actual: Tensor
    reads_data: bool
    own: bool


def interpret(function: Callable[..., Tensor], *inputs: Tensor, dynamic: bool = False) -> Interpretation:
    """Interprets each element of `function(*inputs)`, of up to four dimensions, and evaluates it everywhere."""
    module = trace(function, *inputs, dynamic=dynamic)
    (node,) = results(module)
    roles = tuple(POSITIONS)[: len(shape_of(node))]
    sizes = {**dict.fromkeys(POSITIONS, 1), **dict(zip(roles, shape_of(node), strict=True))}
    value = reader_for(node, sizes).element_at(node, index_of(roles), None)
    values = run(module, *inputs)
    actual = values[node]
    claimed = torch.zeros_like(actual)
    for place in itertools.product(*map(range, actual.shape)):
        claimed[place] = evaluate(value, dict(zip(roles, place, strict=True)), values)
    return Interpretation(claimed, actual, bool(data_of(value)), node in data_of(value))


def evaluate(value: Value, place: Mapping[Role, int], values: Mapping[Node, Any]) -> Any:
    """A value at one place: a bool or a number. Sizes are those of the run."""
    known = {POSITIONS[role]: n for role, n in place.items()}
    for node, made in values.items():
        if node.op == "placeholder":
            known |= dict(zip(node_symbols(node), made.shape, strict=True))
    if isinstance(value, Formula):
        return holds(value, known, values)
    (chosen,) = {id(leaf): leaf for leaf, when in value.items() if holds(when, known, values)}.values()
    return number(chosen, known, values)


def node_symbols(node: Node) -> list[Any]:
    """The size symbols of an input, one a dimension."""
    return [sympy.sympify(size) for size in shape_of(node)]


def holds(formula: Formula, known: Mapping[Any, int], values: Mapping[Node, Any]) -> bool:
    """Whether a formula is true at one place."""
    match formula:
        case AtMostZero(expr):
            return bool(expr.subs(known) <= 0)
        case Fact(data, positive):
            return bool(number(data, known, values)) == positive
        case Same(query, key, equal):
            return (number(query, known, values) == number(key, known, values)) == equal
        case Lag(first, second, by):
            return bool(number(first, known, values) - number(second, known, values) + by <= 0)
        case All(parts):
            return all(holds(part, known, values) for part in parts)
        case Some(parts):
            return any(holds(part, known, values) for part in parts)
    raise TypeError(formula)


CALLS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in ("exp", "log", "sqrt", "pow", "maximum", "minimum")},
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "neg", "abs")},
    "div": operator.truediv,
    "floor_divide": lambda a, b: torch.div(a, b, rounding_mode="floor"),
    "remainder": torch.remainder,
}


def number(leaf: Any, known: Mapping[Any, int], values: Mapping[Node, Any]) -> Any:
    """A leaf of a value at one place."""
    match leaf:
        case Data(node, index):
            return values[node][tuple(int(e.subs(known)) for e in index)].item()
        case Call(op, args):
            return CALLS[op](*(torch.tensor(number(a, known, values)) for a in args)).item()
        case sympy.Expr():
            return int(leaf.subs(known))
    return leaf


def data_of(value: Any) -> set[Node]:
    """The nodes whose elements a value reads."""
    match value:
        case Data(node, _):
            return {node}
        case Fact(data, _):
            return {data.node}
        case All(parts) | Some(parts):
            return set().union(*map(data_of, parts))
        case Same(query, key, _) | Lag(query, key, _):
            return data_of(query) | data_of(key)
        case Call(_, parts):
            return set().union(*map(data_of, parts))
        case Mapping():
            return set().union(*(data_of(leaf) | data_of(when) for leaf, when in value.items()))
    return set()
