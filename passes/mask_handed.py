"""Masks that a graph returns and that are proven from sizes alone: what whoever gets them may take for granted.

Where Dynamo breaks a function between the mask and the attention, the mask comes into the second graph as a tensor like
any other. The first graph therefore says what it knows of it (attnopt.buffers, attnopt.guards).
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, GraphModule, Node

from attnopt.passes.mask_bounds import POSITIONS, Role
from attnopt.passes.mask_formula import All, AtMostZero, Formula, NotUnderstood, Some
from attnopt.passes.mask_literals import MOST_RUNS, Planes
from attnopt.passes.mask_numbers import is_constant, round_to
from attnopt.passes.mask_reader import as_numbers
from attnopt.passes.mask_rules import reader_for
from attnopt.passes.sizes import Size, is_one, shape_of
from attnopt.shadow import fake_value, trace
from attnopt.shadow_bodies import LONGEST
from attnopt.shadow_effects import mutates, written
from attnopt.shadow_triage import name_of, nesting

#: The roles of up to six dimensions; the last two are queries and keys.
ROLES: tuple[Role, ...] = ("x", "y", "b", "h", "i", "j")


def forms_made(module: GraphModule) -> dict[int, Planes]:
    """Place of a result -> its form, for those that are masks made from sizes alone."""
    made = _made_of_sizes(module.graph)
    returned = next(n for n in module.graph.nodes if n.op == "output").args[0]
    asked = {
        place: node
        for place, node in enumerate(returned if isinstance(returned, tuple | list) else ())
        if node in made and _may_be_mask(fake_value(node))
    }
    if not asked or len(made) > LONGEST:
        return {}
    copied, ends = _copied(module, list(made), list(asked.values()))
    with fake_value(next(iter(asked.values()))).fake_mode:
        shadow = trace(copied)
    found = {place: form_of_plane(shadow.outputs.get(ends[node])) for place, node in asked.items()}
    return {place: form for place, form in found.items() if form is not None}


def _made_of_sizes(graph: Graph) -> dict[Node, None]:
    """The nodes that compute from nothing but sizes, in order; none if others might write to what they make."""
    made: dict[Node, None] = {}
    for node in graph.nodes:
        inputs = node.all_input_nodes
        is_call = node.op in ("call_function", "call_method")
        if nesting(node):
            return {}
        if (node.op == "placeholder" and _is_number(node)) or (is_call and all(n in made for n in inputs)):
            made[node] = None
        elif is_call and any(n in made and not _is_number(n) for n in _written(node)):
            return {}
    return made


def _is_number(node: Node) -> bool:
    return isinstance(fake_value(node), int | float | torch.SymInt | torch.SymFloat)


def _written(node: Node) -> Sequence[Node]:
    """The arguments to which a call may write, by the look of it."""
    if isinstance(node.target, HigherOrderOperator) or "out" in node.kwargs:
        return node.all_input_nodes
    if isinstance(node.target, OpOverload):
        return written(node) if mutates(node) else ()
    name = name_of(node.target)
    in_place = name.endswith("_") and not name.endswith("__")
    writes = in_place or name in _WRITES or "inplace" in node.kwargs
    return [n for n in node.args[:1] if isinstance(n, Node)] if writes else ()


_WRITES = frozenset(
    {
        "setitem",
        *(f"i{op}" for op in ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "xor", "pow", "mod")),
    }
)


def _may_be_mask(value: Any) -> bool:
    if type(value).__name__ != "FakeTensor" or value.requires_grad or not 2 <= value.dim() <= len(ROLES):
        return False
    return (value.dtype == torch.bool or value.is_floating_point()) and 1 not in value.shape[-2:]


def _copied(
    module: GraphModule, nodes: Sequence[Node], ends: Sequence[Node]
) -> tuple[GraphModule, Mapping[Node, Node]]:
    """A graph of these nodes alone, which returns some of them; and which node became which."""
    graph = Graph()
    known: dict[Node, Node] = {}
    for node in sorted(nodes, key=lambda n: n.op != "placeholder"):
        known[node] = graph.node_copy(node, known.__getitem__)
    graph.output(tuple(known[end] for end in ends))
    return GraphModule(module, graph), known


def form_of_plane(node: Any) -> Planes | None:
    """The form of a tensor, if each of its elements provably depends on the distance of query and key alone."""
    if not isinstance(node, Node):
        return None
    shape = shape_of(node)
    roles = ROLES[len(ROLES) - len(shape) :]
    sizes: dict[Role, Size] = {**dict.fromkeys(ROLES, 1), **dict(zip(roles, shape, strict=True))}
    reader = reader_for(node, sizes)
    asked = tuple(None if is_one(size) else role for role, size in zip(roles, shape, strict=True))
    try:
        cases = as_numbers(reader.logic, reader.read(node, asked, None))
        ends = sorted({end for when in cases.values() for end in _ends(when)})
        if len(ends) >= MOST_RUNS or not all(map(is_constant, cases)):
            return None
        numbers = [_number(cases, at, node.meta["val"].dtype) for at in (*ends, (ends or [0])[-1] + 1)]
    except NotUnderstood:
        return None
    return Planes(tuple(zip(ends, numbers[:-1], strict=True)), numbers[-1])


def _ends(formula: Formula) -> Iterator[int]:
    """The diagonals at which the condition changes: it is one thing up to them, and may be another beyond."""
    match formula:
        case AtMostZero(expr):
            slope = expr.coeff(POSITIONS["j"], 1)
            rest = sympy.expand(expr - slope * (POSITIONS["j"] - POSITIONS["i"]))
            if slope not in (1, -1) or not rest.is_Integer:
                raise NotUnderstood
            yield -int(rest) if slope == 1 else int(rest) - 1
        case All(parts) | Some(parts):
            for part in parts:
                yield from _ends(part)
        case _:
            raise NotUnderstood


def _number(cases: Mapping[Any, Formula], at: int, dtype: torch.dtype) -> float:
    """The number on the diagonal j - i = at."""
    (leaf,) = (leaf for leaf, when in cases.items() if _holds(when, at))
    return float(leaf) if dtype == torch.bool else round_to(float(leaf), dtype)


def _holds(formula: Formula, at: int) -> bool:
    match formula:
        case AtMostZero(expr):
            return bool(expr.subs({POSITIONS["i"]: 0, POSITIONS["j"]: at}) <= 0)
        case All(parts):
            return all(_holds(part, at) for part in parts)
        case Some(parts):
            return any(_holds(part, at) for part in parts)
    raise NotUnderstood
