"""Puts the chosen call into the original graph in place of the site's root, and removes what became unnecessary."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from attnopt.passes import emit
from attnopt.passes.sizes import hint, is_one, same, size_of
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow, fake_mode, mutates
from attnopt.spec import AttentionSpec

aten = torch.ops.aten

#: Operations that keep the memory of their input.
_STRIDED = frozenset(
    {
        aten.transpose.int, aten.permute.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor,
        aten.select.int, aten.alias.default, aten.t.default, aten.mT.default, aten.to.dtype, aten.detach.default,
        aten.reshape.default, aten.flatten.using_ints,
    }
)  # fmt: skip


#: Operations after which the memory layout of their input no longer shows.
_FORGETFUL = frozenset(
    {
        aten.contiguous.default, aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default,
        aten.addmm.default, aten.baddbmm.default, aten.einsum.default, aten.cat.default, aten.stack.default,
    }
)  # fmt: skip


def trace_call(shadow: Shadow, site: Site, spec: AttentionSpec, run: emit.Run) -> GraphModule:
    """The call as ATen under the site's own fake values. Raises Reject if its output would not fit the root's."""
    values = [node.meta["val"] for node in emit.leaves(site)]
    with fake_mode(values):
        called = _call_as_laid_out(shadow, site, spec, run)
        try:
            traced = make_fx(called, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
        except GuardOnDataDependentSymNode as problem:
            raise Reject("a size depends on data, and the kernel has to know it", site.root) from problem
    made, wanted = _result(traced).meta["val"], site.root.meta["val"]
    if made.dtype != wanted.dtype or len(made.shape) != len(wanted.shape):
        raise Reject(
            f"the kernel makes {made.dtype} {tuple(made.shape)}, the graph {tuple(wanted.shape)}", site.root
        )
    if _shows_layout(shadow, site.root) and not _is_laid_out_as(made, wanted):
        raise Reject("what follows depends on a memory layout which the kernel does not give", site.root)
    return traced


def _call_as_laid_out(
    shadow: Shadow, site: Site, spec: AttentionSpec, run: emit.Run
) -> Callable[..., Tensor]:
    """The call; where its memory layout shows, laid out as the root."""
    if not _shows_layout(shadow, site.root):
        return lambda *values: emit.call(site, spec, run, values)
    order = _memory_order(site.root.meta["val"])
    if order == sorted(order):
        return lambda *values: emit.call(site, spec, run, values).contiguous()
    back = [order.index(d) for d in range(len(order))]
    return lambda *values: emit.call(site, spec, run, values).permute(order).contiguous().permute(back)


def _memory_order(value: Tensor) -> list[int]:
    """The dimensions from the one with the longest stride to the one with the shortest."""
    strides = [hint(s) for s in value.stride()]
    return sorted(range(len(strides)), key=lambda d: (-strides[d], d))


def _is_laid_out_as(made: Tensor, wanted: Tensor) -> bool:
    """Whether strides agree, for certain, in every dimension that has more than one element."""
    places = zip(made.shape, made.stride(), wanted.stride(), strict=True)
    return all(is_one(size_of(size)) or same(size_of(a), size_of(b)) for size, a, b in places)


def _shows_layout(shadow: Shadow, node: Node) -> bool:
    """Whether the value, or a view of it, leaves the graph or meets an operation that may see its layout.

    A `view` may; and what works element by element does, since its result is laid out alike.
    """
    users = [user for user in shadow.users(node) if user.target not in _FORGETFUL]
    return node in shadow.results or any(
        user.target not in _STRIDED or _shows_layout(shadow, user) for user in users
    )


def splice(shadow: Shadow, site: Site, traced: GraphModule, values: dict[Node, Node]) -> None:
    """Inserts the traced call and gives its value to every user of the root.

    values: shadow node -> the original node with its value, as the splices so far have left the graph; is updated.
    """
    graph = shadow.original.graph
    targets = [node for node, value in shadow.outputs.items() if value is site.root]
    place = targets[0] if targets else _enclosing(shadow, site.root)
    with graph.inserting_before(place):
        editor = _Editor(graph, values)
        arguments = [editor.copy(node) for node in emit.leaves(site)]
        value = _inline(graph, traced, arguments, place)
        values[site.root] = value
        if targets:
            place.replace_all_uses_with(value)
        else:
            _expand(shadow, editor, place)


def finish(shadow: Shadow, sites: Iterable[Site]) -> None:
    """Removes what the spliced calls made unnecessary; after the last splice, since sites may share masks."""
    spliced = list(sites)
    interior = {node for site in spliced for node in (*site.interior, site.root)}
    originals = _originals(shadow, interior)
    _erase(sorted(originals, key=lambda n: n.name), originals)


def _enclosing(shadow: Shadow, root: Node) -> Node:
    """The original node inside which the root was computed (such as a whole multi_head_attention_forward)."""
    origin = shadow.origin.get(root)
    if origin is None or origin.op == "placeholder":
        raise Reject("the site has no place in the graph", root)
    return origin


class _Editor:
    """Copies shadow nodes into the original graph where it has no node with their value."""

    def __init__(self, graph: Graph, values: Mapping[Node, Node]) -> None:
        self.graph = graph
        self.values = values
        self.known: dict[Node, Node] = {}

    def copy(self, node: Node) -> Node:
        """The original node with the value of a shadow node, made if need be."""
        original = self.values.get(node)
        if original is not None:
            return original
        if node not in self.known:
            self.known[node] = self._copy(node)
        return self.known[node]

    def _copy(self, node: Node) -> Node:
        if node.op != "call_function" or mutates(node):
            raise Reject(f"the value of {node.name} is not at hand where the call goes", node)
        made = self.graph.node_copy(node, self.copy)
        _set_value(made, node.meta.get("val"))
        return made


def _expand(shadow: Shadow, editor: _Editor, place: Node) -> None:
    """One original node held the whole site: its outputs are rebuilt from copies of what it did."""
    value = shadow.outputs.get(place)
    if value is None:
        raise Reject(f"{place.name} returns something other than tensors", None)
    if isinstance(value, Node):
        place.replace_all_uses_with(editor.copy(value))
        return
    for user in list(place.users):
        if user.op != "call_function" or not isinstance(shadow.outputs.get(user), Node):
            raise Reject(f"{place.name} is used as a whole by {user.name}", None)
        user.replace_all_uses_with(editor.copy(shadow.outputs[user]))
        editor.graph.erase_node(user)


def _inline(graph: Graph, traced: GraphModule, arguments: list[Node], place: Node) -> Node:
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    known: dict[Node, Any] = dict(zip(placeholders, arguments, strict=True))
    for node in traced.graph.nodes:
        if node.op == "call_function":
            known[node] = graph.node_copy(node, lambda n: known[n])
            _set_value(known[node], node.meta.get("val"))
            _keep_provenance(known[node], place)
        elif node.op == "get_attr":
            raise Reject("the kernel call needs a constant tensor", None)
    return known[_result(traced)]


def _result(traced: GraphModule) -> Node:
    output = next(n for n in traced.graph.nodes if n.op == "output")
    return pytree.tree_leaves(output.args[0])[0]


def _set_value(node: Node, value: Any) -> None:
    """Dynamo's graphs keep fake values as `example_value`, exported ones as `val`."""
    node.meta["val"] = value
    node.meta["example_value"] = value


def _keep_provenance(node: Node, place: Node) -> None:
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in place.meta:
            node.meta[key] = place.meta[key]


def _originals(shadow: Shadow, nodes: Iterable[Node]) -> set[Node]:
    return {shadow.origin[n] for n in nodes if n in shadow.origin}


def _erase(start: list[Node], interior: set[Node]) -> None:
    """Removes nodes that nobody uses any more, from the root upwards; writes in place only if they are interior."""
    pending = list(start)
    while pending:
        node = pending.pop()
        if node.users or node.op in ("placeholder", "output"):
            continue
        if _erased(node) or (_has_effect(node) and node not in interior):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        pending.extend(inputs)


def _erased(node: Node) -> bool:
    return bool(getattr(node, "_erased", False))


def _has_effect(node: Node) -> bool:
    """Methods and functions that write in place end with an underscore, or are Python's in-place operators."""
    if node.op == "call_function" and hasattr(node.target, "_schema"):
        return mutates(node)
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in _EFFECTS or node.is_impure()


_EFFECTS = frozenset(
    {
        f"i{op}"
        for op in ("add", "sub", "mul", "truediv", "floordiv", "and", "or", "xor", "pow", "matmul", "mod")
    }
    | {"setitem", "_enter_autocast", "_exit_autocast", "_set_grad_enabled"}
)
