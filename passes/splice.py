"""Puts the chosen call into the original graph in place of the site's root, and removes what became unnecessary."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from attnopt.passes import emit
from attnopt.passes.mask_writes import sharing, writes_after
from attnopt.passes.splice_layout import is_laid_out_as, laid_out, shows_layout
from attnopt.passes.splice_names import other_names
from attnopt.passes.splice_values import set_value, stand_for
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow, fake_mode, mutates
from attnopt.spec import AttentionSpec

aten = torch.ops.aten

#: PyTorch's own call asks such a size whether it is 0.
UNKNOWN_SIZE = (
    "a size depends on data, or is marked as unbacked, and the kernel has to know it; pad to a known length, "
    "and hide what was padded"
)


def trace_call(shadow: Shadow, site: Site, spec: AttentionSpec, run: emit.Run) -> GraphModule:
    """The call as ATen under the site's own fake values. Raises Reject if its output would not fit the root's."""
    values = [node.meta["val"] for node in emit.leaves(site)]
    with fake_mode(values):
        called = _call_as_laid_out(shadow, site, spec, run)
        try:
            traced = make_fx(called, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
        except GuardOnDataDependentSymNode as problem:
            raise Reject(UNKNOWN_SIZE, site.root) from problem
    for result, end in zip(_results(traced), emit.ends(site), strict=True):
        _check_fits(shadow, result.meta["val"], end)
    return traced


def _check_fits(shadow: Shadow, made: Tensor, end: Node) -> None:
    wanted = end.meta["val"]
    if made.dtype != wanted.dtype or len(made.shape) != len(wanted.shape):
        raise Reject(
            f"the kernel makes {made.dtype} {tuple(made.shape)}, the graph {tuple(wanted.shape)}", end
        )
    if shows_layout(shadow, end) and not is_laid_out_as(made, wanted):
        raise Reject("what follows depends on a memory layout which the kernel does not give", end)


def _call_as_laid_out(
    shadow: Shadow, site: Site, spec: AttentionSpec, run: emit.Run
) -> Callable[..., tuple[Tensor, ...]]:
    """The call; what it makes laid out as the graph has it, where that shows."""
    fleeting = [_is_written_later(node, site) for node in emit.leaves(site)]

    def called(*values: Any) -> tuple[Tensor, ...]:
        kept = [value.clone() if late else value for value, late in zip(values, fleeting, strict=True)]
        made = emit.call_all(site, spec, run, kept)
        return tuple(_laid_out(shadow, end, value) for end, value in zip(emit.ends(site), made, strict=True))

    return called


def _is_written_later(node: Node, site: Site) -> bool:
    """Whether a backward pass, which may need an operand that the graph's own does not, would find it changed."""
    return torch.is_grad_enabled() and any(site.root < write for write in writes_after(node, None))


def _laid_out(shadow: Shadow, end: Node, value: Tensor) -> Tensor:
    if writes_after(end, None):
        value = value.clone()  # a kernel's backward pass may need what it returned as it was
    return laid_out(value, end.meta["val"]) if shows_layout(shadow, end) else value


def splice(shadow: Shadow, site: Site, traced: GraphModule, values: dict[Node, Node]) -> None:
    """Inserts the traced call and gives its value to every user of the root.

    values: shadow node -> the original node with its value, as the splices so far have left the graph; is updated.
    """
    if site.body and not _is_part_of_a_call(shadow, site):
        _splice_loop(shadow, site, traced, values)
        return
    graph = shadow.original.graph
    held = values.get(site.root)
    place = held or _enclosing(shadow, site.root)
    names = other_names(shadow, site.root, place)
    with graph.inserting_before(place):
        editor = _Editor(graph, values)
        arguments = [editor.copy(node) for node in emit.leaves(site)]
        (value,) = _inline(graph, traced, arguments, place)
        values[site.root] = value
        if held is not None:
            for name in (held, *names):
                name.replace_all_uses_with(value, lambda user: place < user)
        else:
            _expand(shadow, graph, values, place)


def _is_part_of_a_call(shadow: Shadow, site: Site) -> bool:
    """Whether a loop, which writes nowhere, ends inside one call of the original graph that does more than it."""
    known = any(value is site.root for value in shadow.outputs.values())
    return site.state is None and not known and not any(map(_has_effect, _originals(shadow, site.interior)))


def _splice_loop(shadow: Shadow, site: Site, traced: GraphModule, values: dict[Node, Node]) -> None:
    """A site with several ends, or one whose root is memory that the loop writes to: all are there after the last.

    What used the memory before is the loop itself, and goes with it.
    """
    graph, inside = shadow.original.graph, _originals(shadow, site.interior)
    first = {end: next((n for n, v in shadow.outputs.items() if v is end), None) for end in emit.ends(site)}
    missing = next((end for end, original in first.items() if original is None), None)
    if missing is not None:
        raise Reject("an end of the loop has no place in the graph", missing)
    order = {node: n for n, node in enumerate(graph.nodes)}
    targets = {end: node for end, node in first.items() if node is not None}
    inside -= set(targets.values())
    place = _place_of_loop(site, inside, [*targets.values()], order)
    with graph.inserting_before(place):
        editor = _Editor(graph, values)
        given = [editor.copy(node) for node in emit.leaves(site)]
        late = next((node for node in given if order.get(node, -1) >= order.get(place, len(order))), None)
        if late is not None:
            raise Reject(f"{place.name} uses the loop's result before {late.name} is there", site.root)
        made = _inline(graph, traced, given, next(iter(targets.values())))
    gone = inside | set(targets.values())
    for (end, target), value in zip(targets.items(), made, strict=True):
        target.replace_all_uses_with(value, lambda user: user not in gone)
        values[end] = value


def _place_of_loop(site: Site, inside: set[Node], targets: list[Node], order: dict[Node, int]) -> Node:
    """Before what: after the loop's last write; or, where one end is used before another is written, that use."""
    writes = [node for node in inside if _has_effect(node)]
    written = {target for target in targets if any(target in write.all_input_nodes for write in writes)}
    last = max([*targets, *writes], key=lambda node: order.get(node, -1))
    made = max((order[target] for target in targets if target not in written), default=order[last])
    early = {
        user: target
        for target in targets
        for user in target.users
        if user not in inside and user not in targets and order[user] < order[last]
    }
    for user, target in early.items():
        if target in written or order[user] < made:
            raise Reject(f"{user.name} uses the loop's result before the loop ends", site.root)
    return min(early, key=order.__getitem__) if early else last.next


def finish(shadow: Shadow, sites: Iterable[Site]) -> None:
    """Removes what the spliced calls made unnecessary; after the last splice, since sites may share masks."""
    spliced = list(sites)
    interior = {node for site in spliced for node in (*site.interior, site.root)}
    originals = _originals(shadow, interior)
    seen = _originals(shadow, _seen_writes(shadow, spliced, interior))
    _erase(sorted(originals, key=lambda n: n.name), originals - seen)


def _seen_writes(shadow: Shadow, sites: Sequence[Site], interior: set[Node]) -> Iterator[Node]:
    """Inner writes in place that something else needs: the original graph may name their memory as it was before."""
    read_by_calls = {node for site in sites for node in emit.leaves(site)}
    for node in {node for site in sites if not site.body for node in site.interior}:
        outside = any(user not in interior for user in shadow.users(node))
        if outside or node in shadow.results or node in read_by_calls:
            yield from (write for write in sharing(node) & interior if mutates(write))


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
        if _hands_on(node):
            return self.copy(node.args[0])  # type: ignore[arg-type]
        if node.op != "call_function" or mutates(node):
            raise Reject(f"the value of {node.name} is not at hand where the call goes", node)
        made = self.graph.node_copy(node, self.copy)
        set_value(made, node.meta.get("val"))
        return made


def _hands_on(node: Node) -> bool:
    """Whether a write in place makes the very memory that it writes to, and nothing writes there later."""
    written = node.args[0] if node.op == "call_function" and mutates(node) and node.args else None
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    return isinstance(written, Node) and name.endswith("_") and not writes_after(node, None)


def _expand(shadow: Shadow, graph: Graph, values: dict[Node, Node], place: Node) -> None:
    """One original node held the whole site: its outputs are rebuilt from copies of what it did."""
    gone = {place} if isinstance(shadow.outputs.get(place), Node) else {*place.users}
    gone = {node for node in gone if node.users}
    for node in gone:
        if node.op != "call_function" or not isinstance(shadow.outputs.get(node), Node):
            raise Reject(f"{place.name} is used as a whole by {node.name}", None)
    editor = _Editor(graph, {n: original for n, original in values.items() if original not in gone})
    for node in gone:
        made = editor.copy(shadow.outputs[node])
        if shadow.outputs[node] in editor.known:
            stand_for(made, node)
        node.replace_all_uses_with(made)
        values[shadow.outputs[node]] = made
    values.update(editor.known)
    for node in gone - {place}:
        graph.erase_node(node)


def _inline(graph: Graph, traced: GraphModule, arguments: list[Node], place: Node) -> list[Node]:
    placeholders = [n for n in traced.graph.nodes if n.op == "placeholder"]
    known: dict[Node, Any] = dict(zip(placeholders, arguments, strict=True))
    for node in traced.graph.nodes:
        if node.op == "call_function":
            known[node] = graph.node_copy(node, lambda n: known[n])
            set_value(known[node], node.meta.get("val"))
            stand_for(known[node], place)
        elif node.op == "get_attr":
            raise Reject("the kernel call needs a constant tensor", None)
    return [known[result] for result in _results(traced)]


def _results(traced: GraphModule) -> list[Node]:
    output = next(n for n in traced.graph.nodes if n.op == "output")
    return pytree.tree_leaves(output.args[0])


def _originals(shadow: Shadow, nodes: Iterable[Node]) -> set[Node]:
    return {shadow.origin[n] for n in nodes if n in shadow.origin}


def _erase(start: list[Node], interior: set[Node]) -> None:
    """Removes nodes that nobody uses any more, from the root upwards; writes in place only if they are interior."""
    pending = list(start)
    while pending:
        node = pending.pop()
        if node.users or node.op in ("placeholder", "output"):
            continue
        if _erased(node) or (_has_effect(node) and (node not in interior or _shows(node, interior))):
            continue
        inputs = node.all_input_nodes
        node.graph.erase_node(node)
        pending.extend((*inputs, *(user for source in inputs for user in source.users)))


def _shows(node: Node, interior: set[Node]) -> bool:
    """Whether what a write in place changes is looked at by anything but other such writes that nobody uses."""
    others = {user for target in node.all_input_nodes[:1] for user in target.users} - {node}
    return not all(user in interior and not user.users and _has_effect(user) for user in others)


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
    | {"_vmap_increment_nesting", "_vmap_decrement_nesting"}
)
