"""The shadow: the same computation as pre-dispatch, pre-autograd ATen, each node knowing the graph node it came from.

Reading happens on the shadow (softmax, matmul, einsum and scaled_dot_product_attention are still whole, methods and
operators have become overloads); editing happens on the original graph. It is traced under the graph's own fake
mode, so nothing is computed and symbolic sizes stay symbolic.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.utils import _pytree as pytree

from attnopt.errors import UnsupportedError

#: Key in the metadata of a graph input whose value is a constant of the program.
CONSTANT = "attnopt_constant"


@dataclass(frozen=True, slots=True)
class Shadow:
    """A graph and its shadow.

    original: the graph to be edited. graph: its shadow. value_of: shadow node -> the original node whose value it is
    (the first one). outputs: original node -> its value, a pytree with shadow nodes as leaves. origin: shadow node
    -> the original node during which it was traced. live: nodes that the outputs, or a mutation, depend on. results:
    nodes that the graph returns.
    """

    original: GraphModule
    module: GraphModule
    value_of: Mapping[Node, Node]
    outputs: Mapping[Node, Any]
    origin: Mapping[Node, Node]
    order: Mapping[Node, int]
    live: frozenset[Node]
    results: frozenset[Node]

    def users(self, node: Node) -> list[Node]:
        """Nodes that use the value, not only its shape, and matter to the graph's outputs."""
        return [user for user in node.users if user in self.live and _reads(user, node)]

    @property
    def nodes(self) -> Sequence[Node]:
        """Shadow nodes in execution order."""
        return list(self.module.graph.nodes)

    def inlined(self, node: Node) -> bool:
        """Whether the node lies inside a sub-graph that is read, and edited, by itself."""
        origin = self.origin.get(node)
        if origin is None:
            return node.op == "call_function"
        return isinstance(origin.target, HigherOrderOperator)


def fake_value(node: Node) -> Any:
    """The fake value of a node of a Dynamo graph (`example_value`) or of an exported or shadow graph (`val`)."""
    return node.meta.get("val", node.meta.get("example_value"))


def sub_graphs(module: GraphModule) -> Iterator[GraphModule]:
    """The bodies of higher-order operators in `module` (checkpoints, autocast regions, branches), each once."""
    seen: set[str] = set()
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target not in seen and any(_is_call(user) for user in node.users):
            seen.add(node.target)
            body = _attribute(module, node.target)
            if isinstance(body, GraphModule):
                yield body


def trace(module: GraphModule) -> Shadow:
    """The shadow of `module`; UnsupportedError if its placeholders carry no fake values."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    inputs = [fake_value(n) for n in placeholders]
    missing = [n.name for n, value in zip(placeholders, inputs, strict=True) if value is None]
    if missing:
        raise UnsupportedError(
            f"graph inputs {', '.join(missing)} have no example values in their metadata; attnopt reads graphs "
            "that torch.compile or torch.export made"
        )
    recorder = _Recorder(module)
    with fake_mode(inputs), fx_traceback.preserve_node_meta():
        shadow = make_fx(recorder.record, pre_dispatch=True, _allow_non_fake_inputs=True)(*inputs)
    return _link(module, shadow, recorder)


def _traced_as(value: Any) -> Node | None:
    """The shadow node that made a tensor, as the tracer knows it at this moment."""
    mode = get_proxy_mode()
    if mode is None or not isinstance(value, Tensor):
        return None
    slot = get_proxy_slot(value, mode.tracer, None)
    return None if slot is None else slot.proxy.node


def fake_mode(inputs: Sequence[Any]) -> AbstractContextManager[Any]:
    """The mode that made the inputs; tensors created inside the graph must belong to it too."""
    modes = [x.fake_mode for x in inputs if isinstance(x, FakeTensor)]
    return modes[0] if modes else nullcontext()


class _Recorder(Interpreter):
    """Runs the original graph node by node and keeps each node's value."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.nodes = list(module.graph.nodes)
        self.traced: list[Node] = []
        self.spec: Any = None
        self.made: dict[Node, list[Node | None]] = {}
        self.regions: list[torch.amp.autocast_mode.autocast] = []

    def record(self, *args: Any) -> list[Any]:
        """The values of all nodes, flattened; `traced` and `spec` say how to put them back together."""
        try:
            self.run(*args)
        finally:
            while self.regions:
                self.regions.pop().__exit__(None, None, None)
        values = [(n, self.env[n]) for n in self.nodes if n.op != "output" and n in self.env]
        values = [(n, v) for n, v in values if _is_data(v)]
        self.traced = [n for n, _ in values]
        flat, self.spec = pytree.tree_flatten([v for _, v in values])
        return flat

    def run_node(self, n: Node) -> Any:
        with fx_traceback.set_current_meta(n):
            value = super().run_node(n)
        # Now, not at the end: a later no-op (`x.to(x.dtype)`) hands the same tensor on under another shadow node.
        self.made[n] = [_traced_as(leaf) for leaf in pytree.tree_leaves(value)]
        return value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.amp.autocast_mode._enter_autocast:
            # The tracer would only note the call; the region must be in force for values to have their true dtypes.
            self.regions.append(torch.amp.autocast_mode.autocast(*args))
            self.regions[-1].__enter__()
            return self.regions[-1]
        if target is torch.amp.autocast_mode._exit_autocast:
            self.regions.pop().__exit__(None, None, None)
            return None
        if isinstance(target, HigherOrderOperator):
            bodies = [i for i, a in enumerate(args) if isinstance(a, GraphModule)]
            if len(bodies) == 1 and _takes(args[bodies[0]], args[bodies[0] + 1 :]):
                return Interpreter(args[bodies[0]]).run(*args[bodies[0] + 1 :])
        return super().call_function(target, args, kwargs)


def _link(module: GraphModule, shadow: GraphModule, recorder: _Recorder) -> Shadow:
    output = next(n for n in shadow.graph.nodes if n.op == "output")
    made = (leaf for n in recorder.traced for leaf in recorder.made[n])
    leaves = [early or late for early, late in zip(made, output.args[0], strict=True)]
    outputs = dict(zip(recorder.traced, pytree.tree_unflatten(leaves, recorder.spec), strict=True))
    value_of: dict[Node, Node] = {}
    for original, value in outputs.items():
        if isinstance(value, Node):
            value_of.setdefault(value, original)
    names = {n.name: n for n in module.graph.nodes}
    sources = {n: _source(n, module.graph) for n in shadow.graph.nodes}
    origin = {n: names[name] for n, name in sources.items() if name in names}
    _copy_constants(module, shadow)
    results = _results(module, outputs)
    order = {n: i for i, n in enumerate(shadow.graph.nodes)}
    return Shadow(module, shadow, value_of, outputs, origin, order, _live(shadow.graph, results), results)


def _copy_constants(module: GraphModule, shadow: GraphModule) -> None:
    placeholders = ([n for n in m.graph.nodes if n.op == "placeholder"] for m in (module, shadow))
    for original, node in zip(*placeholders, strict=True):
        if CONSTANT in original.meta:
            node.meta[CONSTANT] = original.meta[CONSTANT]


def _results(module: GraphModule, outputs: Mapping[Node, Any]) -> frozenset[Node]:
    """The shadow nodes that the original graph returns."""
    returned = next(n for n in module.graph.nodes if n.op == "output").all_input_nodes
    leaves = (leaf for n in returned for leaf in pytree.tree_leaves(outputs.get(n)))
    return frozenset(leaf for leaf in leaves if isinstance(leaf, Node))


def _live(graph: Graph, results: frozenset[Node]) -> frozenset[Node]:
    """Everything that the results or a mutation depend on; the tracer itself keeps all nodes."""
    live: set[Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "output" and (node in results or mutates(node) or any(u in live for u in node.users)):
            live.add(node)
    return frozenset(live)


def _reads(user: Node, node: Node) -> bool:
    """Whether `user` needs the elements of `node`."""
    shape_only = _SHAPE_OF.get(user.target)
    return shape_only is None or any(
        arg is node for place, arg in enumerate(user.args) if place != shape_only
    )


#: Operations that take only shape and dtype from the argument at this place.
_SHAPE_OF: Mapping[object, int] = {
    torch.ops.aten.expand_as.default: 1,
    torch.ops.aten.view_as.default: 1,
    torch.ops.aten.reshape_as.default: 1,
    torch.ops.aten.type_as.default: 1,
    torch.ops.aten.to.other: 1,
    **dict.fromkeys(
        (
            torch.ops.aten.sym_size.int, torch.ops.aten.zeros_like.default, torch.ops.aten.ones_like.default,
            torch.ops.aten.full_like.default, torch.ops.aten.empty_like.default, torch.ops.aten.new_zeros.default,
            torch.ops.aten.new_ones.default, torch.ops.aten.new_full.default, torch.ops.aten.new_empty.default,
        ),
        0,
    ),
}  # fmt: skip


def mutates(node: Node) -> bool:
    """Whether the node writes to one of its arguments, or has another effect."""
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    return (schema is None and not _is_scalar(node)) or (schema is not None and schema.is_mutable)


def written(node: Node) -> list[Node]:
    """The arguments that a node writes to; all tensor arguments if it does not say."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return node.all_input_nodes
    named = {a.name: value for a, value in zip(schema.arguments, node.args, strict=False)} | dict(node.kwargs)
    targets = (
        named.get(a.name) for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write
    )
    return [n for target in targets for n in pytree.tree_leaves(target) if isinstance(n, Node)]


def _is_scalar(node: Node) -> bool:
    """Python arithmetic on sizes has no schema and no effect."""
    return isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)


def _source(node: Node, graph: Graph) -> str | None:
    """The node of `graph` that was running; None for a node of an inlined body, whose names may repeat ours."""
    history = list(node.meta.get("from_node") or [])
    while history:
        entry = history.pop()
        if entry.graph_id == id(graph):
            return str(entry.name)
        history.extend(entry.from_node)
    return None


def _is_data(value: Any) -> bool:
    leaves = pytree.tree_leaves(value)
    return bool(leaves) and all(
        isinstance(x, Tensor | torch.SymInt | torch.SymFloat | torch.SymBool) for x in leaves
    )


def _takes(body: GraphModule, args: Sequence[Any]) -> bool:
    """Whether the operator hands its arguments on to the body, one by one (a checkpoint does, a branch does not)."""
    return sum(n.op == "placeholder" for n in body.graph.nodes) == len(args)


def _is_call(node: Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, HigherOrderOperator)


def _attribute(module: torch.nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
