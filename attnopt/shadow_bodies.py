"""Graphs inside graphs: the bodies of higher-order operators, and what the graph around one says about its inputs.

A checkpointed layer gets its mask as an input, so by itself it cannot know that the mask is causal. What the graph
around it computes from nothing but sizes is therefore computed once more in the shadow of the body: there it is read
like any other mask, while the body itself stays as it is.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import getitem
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from attnopt.shadow_effects import mutates, written

if TYPE_CHECKING:
    from attnopt.shadow import Shadow

#: A mask that takes more operations than this is no formula that somebody wrote down.
LONGEST = 200

#: Operators that hand all their operands to their bodies, one by one.
_HANDS_ON = frozenset(
    {
        "tag_activation_checkpoint", "wrap_activation_checkpoint", "wrap", "wrap_with_autocast", "invoke_subgraph",
        "wrap_with_set_grad_enabled", "cond",
    }
)  # fmt: skip
#: Operators that call their body again and again, with the same last group of operands.
_REPEATS = frozenset({"while_loop", "map_impl", "scan", "associative_scan"})


@dataclass(frozen=True, slots=True)
class Around:
    """What the graph around a body says of it.

    known: place of an input -> the shadow nodes of the graph around that compute it from sizes, its own value last.
    regions: the arguments of the autocast regions in which the body is called, the outermost first.
    """

    known: Mapping[int, tuple[Node, ...]] = field(default_factory=dict)
    regions: tuple[tuple[Any, ...], ...] = ()


NOTHING = Around()


def sub_graphs(module: GraphModule) -> Iterator[GraphModule]:
    """The bodies of higher-order operators in `module` (checkpoints, autocast regions, branches), each once."""
    seen: set[str] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target not in seen and any(is_call(user) for user in node.users):
            seen.add(node.target)
            body = attribute(module, node.target)
            if isinstance(body, GraphModule):
                yield body


def is_call(node: Node) -> bool:
    """Whether the node calls a higher-order operator."""
    return node.op == "call_function" and isinstance(node.target, HigherOrderOperator)


def attribute(module: torch.nn.Module, path: str) -> Any:
    """`module.a.b` for "a.b"."""
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value


def body_of(args: Sequence[Any]) -> int | None:
    """The place of the one body that gets the arguments behind it one by one; None if the operator works otherwise.

    One with groups of arguments (scan, flex_attention) calls its body as it likes, however many inputs that has.
    """
    bodies = [place for place, value in enumerate(args) if isinstance(value, GraphModule)]
    if len(bodies) != 1:
        return None
    given = operands(args[bodies[0] + 1 :])
    if any(isinstance(value, Sequence | Mapping) for value in given):
        return None
    return bodies[0] if len(placeholders(args[bodies[0]])) == len(given) else None


def operands(args: Sequence[Any]) -> list[Any]:
    """What the body gets of the arguments behind it: all but its name."""
    return [value for value in args if not isinstance(value, str)]


def region(target: object, args: Sequence[Any]) -> tuple[Any, ...] | None:
    """The arguments of the autocast region that a higher-order operator opens for its body."""
    if str(target) != "wrap_with_autocast":
        return None
    device, dtype, enabled, cached = args[:4]
    return device, dtype, enabled, cached


def placeholders(module: GraphModule) -> list[Node]:
    """The inputs of a graph."""
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def surroundings(shadow: "Shadow", body: GraphModule) -> Around:
    """What `shadow` says about one of the bodies of its graph; what its calls do not agree upon is not said."""
    calls = [n for n in shadow.original.graph.nodes if is_call(n) and _calls(shadow.original, n, body)]
    regions = {_regions(shadow, call) for call in calls}
    fed = [_fed(shadow, call, len(placeholders(body))) for call in calls]
    agreed = {p: n for p, n in (fed[0] if fed else {}).items() if all(other.get(p) is n for other in fed)}
    slicer = _Slicer(shadow, _symbols(placeholders(body)), frozenset(_written(shadow)))
    slices = ((place, slicer.slice(node)) for place, node in agreed.items())
    return Around(
        {place: nodes for place, nodes in slices if nodes}, regions.pop() if len(regions) == 1 else ()
    )


def _calls(module: GraphModule, call: Node, body: GraphModule) -> bool:
    held = (a for a in call.args if isinstance(a, Node) and a.op == "get_attr")
    return any(attribute(module, str(a.target)) is body for a in held)


def _regions(shadow: "Shadow", call: Node) -> tuple[tuple[Any, ...], ...]:
    own = region(call.target, call.args)
    return (*shadow.regions.get(call, ()), *((own,) if own else ()))


def _fed(shadow: "Shadow", call: Node, count: int) -> dict[int, Node]:
    """Place of an input of the body -> the shadow node whose value it always gets."""
    last = max(place for place, a in enumerate(call.args) if isinstance(a, Node) and a.op == "get_attr")
    name, rest = str(call.target), operands(call.args[last + 1 :])
    given = pytree.tree_leaves(rest if name in _HANDS_ON else rest[-1:] if name in _REPEATS else [])
    if len(given) > count or (name in _HANDS_ON and len(given) != count):
        return {}
    places = enumerate(given, start=count - len(given))
    values = ((place, shadow.outputs.get(a)) for place, a in places if isinstance(a, Node))
    return {place: value for place, value in values if isinstance(value, Node)}


@dataclass(frozen=True, slots=True)
class _Slicer:
    """symbols: the sizes that the body knows by itself. touched: the memory that the graph around writes to."""

    shadow: "Shadow"
    symbols: frozenset[Any]
    touched: frozenset[int]

    def slice(self, value: Node) -> tuple[Node, ...]:
        """The nodes that make `value`, in order, if they may be run again anywhere; else none."""
        seen: set[Node] = set()
        pending = [value]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            if len(seen) > LONGEST or not (is_size(node) or self._is_repeatable(node)):
                return ()
            if not _symbols([node]) <= self.symbols:
                return ()
            seen.add(node)
            pending.extend(() if is_size(node) else node.all_input_nodes)
        return tuple(sorted(seen, key=lambda n: self.shadow.order[n])) if not is_size(value) else ()

    def _is_repeatable(self, node: Node) -> bool:
        """Neither an input, nor random, nor written to: the same wherever it is computed."""
        if node.op == "get_attr":
            return _is_number(attribute(self.shadow.module, str(node.target)))
        if node.op != "call_function" or mutates(node):
            return False
        if node.target is getitem:
            return True
        known = (
            isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded not in node.target.tags
        )
        return known and not {*_storages(node)} & self.touched


def is_size(node: Node) -> bool:
    """Whether the value is a number rather than a tensor: it is at hand wherever its symbols are."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _storages(node: Node) -> Iterator[int]:
    for value in pytree.tree_leaves(node.meta.get("val")):
        if isinstance(value, Tensor):
            yield value.untyped_storage()._cdata


def _written(shadow: "Shadow") -> Iterator[int]:
    """The memory that some node may write to; a higher-order operator does if a call in its body looks like it."""
    for node in shadow.nodes:
        if mutates(node) and not (is_call(node) and not _may_write(shadow, node)):
            for argument in written(node):
                yield from _storages(argument)


def _may_write(shadow: "Shadow", call: Node) -> bool:
    held = (a for a in call.args if isinstance(a, Node) and a.op == "get_attr")
    bodies = (attribute(shadow.module, str(a.target)) for a in held)
    return any(mutates(n) for body in bodies if isinstance(body, GraphModule) for n in body.graph.nodes)


def _symbols(nodes: Iterable[Node]) -> frozenset[Any]:
    """The symbols in the sizes, or numbers, that the nodes have as values."""
    values = pytree.tree_leaves([n.meta.get("val", n.meta.get("example_value")) for n in nodes])
    numbers = [s for v in values for s in ((*v.shape, *v.stride()) if isinstance(v, Tensor) else (v,))]
    symbolic = (n for n in numbers if isinstance(n, torch.SymInt | torch.SymFloat | torch.SymBool))
    return frozenset(symbol for n in symbolic for symbol in n.node.expr.free_symbols)


def replay(slice_: Sequence[Node], known: dict[Node, Any]) -> Any:
    """Runs a slice; `known` holds what has been run before, and is added to."""
    for node in slice_:
        if node in known:
            continue
        if is_size(node):
            known[node] = node.meta["val"]
        elif node.op == "get_attr":
            owner = node.graph.owning_module
            known[node] = attribute(owner, str(node.target)) if owner is not None else None
        else:
            args, kwargs = pytree.tree_map_only(Node, known.__getitem__, (node.args, dict(node.kwargs)))
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[slice_[-1]]


def is_alike(value: Any, input_: Any) -> bool:
    """Whether a replayed value has shape, dtype and device of the input it stands for."""
    if not (isinstance(value, Tensor) and isinstance(input_, Tensor)):
        return False
    return (value.shape, value.dtype, value.device) == (input_.shape, input_.dtype, input_.device)
