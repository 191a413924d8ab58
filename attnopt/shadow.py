"""The shadow: the same computation as pre-dispatch, pre-autograd ATen, each node knowing the graph node it came from.

Reading happens on the shadow (softmax, matmul, einsum and scaled_dot_product_attention are still whole, methods and
operators have become overloads); editing happens on the original graph. It is traced under the graph's own fake
mode, so nothing is computed and symbolic sizes stay symbolic.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.utils import _pytree as pytree

from attnopt.buffers import BUFFER
from attnopt.errors import UnsupportedError
from attnopt.shadow_bodies import NOTHING, Around, is_alike, is_call, placeholders, replay, sub_graphs
from attnopt.shadow_effects import mutates, reads, written
from attnopt.shadow_runner import Expansions, Runner
from attnopt.shadow_triage import check_plain, check_readable
from attnopt.shadow_vmap import Region as Vmapped
from attnopt.shadow_vmap import regions_of

__all__ = ["Expansions", "Shadow", "fake_mode", "fake_value", "mutates", "sub_graphs", "trace", "written"]

#: Key in the metadata of a graph input whose value is a constant of the program.
CONSTANT = "attnopt_constant"


@dataclass(frozen=True, slots=True)
class Shadow:
    """A graph and its shadow.

    original: the graph to be edited. graph: its shadow. value_of: shadow node -> the original node whose value it is
    (the first one). outputs: original node -> its value, a pytree with shadow nodes as leaves. origin: shadow node
    -> the original node during which it was traced. live: nodes that the outputs, or a mutation, depend on. results:
    nodes that the graph returns. regions: call of a higher-order operator -> the autocast regions it stands in.
    vmapped: nodes for what the original graph computes under torch.vmap, where nothing can be put.
    """

    original: GraphModule
    module: GraphModule
    value_of: Mapping[Node, Node]
    outputs: Mapping[Node, Any]
    origin: Mapping[Node, Node]
    order: Mapping[Node, int]
    live: frozenset[Node]
    results: frozenset[Node]
    regions: Mapping[Node, tuple[tuple[Any, ...], ...]] = field(default_factory=dict)
    vmapped: frozenset[Node] = frozenset()

    def users(self, node: Node) -> list[Node]:
        """Nodes that use the value, not only its shape, and matter to the graph's outputs."""
        return [user for user in node.users if user in self.live and reads(user, node)]

    @property
    def nodes(self) -> Sequence[Node]:
        """Shadow nodes in execution order."""
        return list(self.module.graph.nodes)

    def inlined(self, node: Node) -> bool:
        """Whether the node lies inside a sub-graph that is read, and edited, by itself."""
        origin = self.origin.get(node)
        if origin is None:
            return node.op == "call_function"
        if origin.target is torch.ops.higher_order.scan:
            return False  # spelled out as a loop, or not entered at all
        return is_call(origin) or (origin.op == "placeholder" and node.op == "call_function")


def fake_value(node: Node) -> Any:
    """The fake value of a node of a Dynamo graph (`example_value`) or of an exported or shadow graph (`val`)."""
    return node.meta.get("val", node.meta.get("example_value"))


def trace(module: GraphModule, expansions: Expansions | None = None, around: Around = NOTHING) -> Shadow:
    """The shadow of `module`; UnsupportedError if it cannot be traced by itself, or its inputs have no fake values.

    expansions: functions that are traced in place of operators, where their arguments allow it. around: what is known
    of the inputs of a body, from the graph that calls it.
    """
    check_readable(module)
    inputs = [fake_value(n) for n in placeholders(module)]
    missing = [n.name for n, value in zip(placeholders(module), inputs, strict=True) if value is None]
    if missing:
        raise UnsupportedError(
            f"graph inputs {', '.join(missing)} have no example values in their metadata; attnopt reads graphs "
            "that torch.compile or torch.export made"
        )
    with fake_mode(inputs):
        vmapped = regions_of(module, around.regions)
    for node in module.graph.nodes:
        if not node.meta:  # PyTorch notes where a traced node came from only if that had metadata
            node.meta["from_node"] = []
    recorder = _Recorder(module, expansions or {}, around, vmapped)
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
    """The mode that made the inputs; tensors created inside the graph must belong to it too.

    Of symbolic numbers alone, behind a graph break, it is the one that Dynamo traces with.
    """
    modes = [x.fake_mode for x in inputs if isinstance(x, FakeTensor)]
    symbolic = any(isinstance(x, torch.SymInt | torch.SymFloat | torch.SymBool) for x in inputs)
    made = modes[0] if modes else detect_fake_mode() if symbolic else None
    return nullcontext() if made is None else made


class _Recorder(Runner):
    """Runs the original graph node by node and keeps each node's value."""

    def __init__(
        self, module: GraphModule, expansions: Expansions, around: Around, vmapped: Mapping[Node, Vmapped]
    ) -> None:
        super().__init__(module, expansions, [], vmapped)
        self.around = around
        self.inputs = placeholders(module)
        self.nodes = list(module.graph.nodes)
        self.traced: list[Node] = []
        self.spec: Any = None
        self.made: dict[Node, list[Node | None]] = {}
        self.standing: dict[Node, tuple[tuple[Any, ...], ...]] = {}
        self.given: dict[Node, Any] = {}

    def record(self, *args: Any) -> list[Any]:
        """The values of all nodes, flattened; `traced` and `spec` say how to put them back together."""
        self.given = dict(self._replayed(args))
        try:
            for region_ in self.around.regions:
                self.enter(region_)
            self.run(*args)
        finally:
            self.leave(0)
        values = [(n, self.env[n]) for n in self.nodes if n.op != "output" and n in self.env]
        values = [(n, v) for n, v in values if _is_data(v)]
        self.traced = [n for n, _ in values]
        flat, self.spec = pytree.tree_flatten([v for _, v in values])
        return flat

    def _replayed(self, args: Sequence[Any]) -> Iterator[tuple[Node, Any]]:
        """The inputs that the graph around computes from sizes, computed here once more."""
        known: dict[Node, Any] = {}
        for place, nodes in self.around.known.items():
            with fx_traceback.set_current_meta(self.inputs[place]):
                value = replay(nodes, known)
            if is_alike(value, args[place]):
                yield self.inputs[place], value

    def run_node(self, n: Node) -> Any:
        if is_call(n):
            self.standing[n] = tuple(args for args, _ in self.regions)
        with fx_traceback.set_current_meta(n):
            value = super().run_node(n)
        value = self.given.get(n, value)
        check_plain(n, value)
        # Now, not at the end: a later no-op (`x.to(x.dtype)`) hands the same tensor on under another shadow node.
        self.made[n] = [_traced_as(leaf) for leaf in pytree.tree_leaves(value)]
        return value


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
    live = _live(shadow.graph, results)
    vmapped = frozenset(n for n, source in origin.items() if source in recorder.hidden)
    return Shadow(module, shadow, value_of, outputs, origin, order, live, results, recorder.standing, vmapped)


def _copy_constants(module: GraphModule, shadow: GraphModule) -> None:
    for original, node in zip(placeholders(module), placeholders(shadow), strict=True):
        for key in (CONSTANT, BUFFER):
            if key in original.meta:
                node.meta[key] = original.meta[key]


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
