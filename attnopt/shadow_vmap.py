"""Regions of a graph that run under torch.vmap: their values belong to the transform, and are batched out of sight.

For the shadow each region is traced by itself, below the transform, into plain operators on the whole batch: what a
mask function does to one pair of positions is then read like a mask over all of them. The original graph keeps the
region as it is, and nothing is spliced into it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Interpreter, Node
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from attnopt.errors import UnsupportedError
from attnopt.shadow_bodies import attribute, body_of, is_alike, is_call, region
from attnopt.shadow_triage import line_of, nesting

#: The arguments of the autocast regions in force, the outermost first.
Regions = tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, slots=True)
class Region:
    """From the node that opens an outermost vmap to the one that closes it.

    given: the nodes outside whose values it uses. results: those of its nodes that something outside uses. flat: the
    same computation in plain operators, from the values of `given` to those of `results`.
    """

    nodes: tuple[Node, ...]
    given: tuple[Node, ...]
    results: tuple[Node, ...]
    flat: GraphModule

    def run(self, values: Sequence[Any]) -> dict[Node, Any]:
        """The results, by the plain operators; UnsupportedError for other values than those it was traced for."""
        for node, value in zip(self.given, values, strict=True):
            known = _known(node)
            if isinstance(known, Tensor) and not is_alike(value, known):
                raise UnsupportedError(
                    f"{node.name} comes into torch.vmap{line_of(node)} in another form than the graph notes; compile "
                    "the function without torch.vmap, or outside of the autocast region"
                )
        made = _Replayed(self.flat, garbage_collect_values=False).run(*values)
        return dict(zip(self.results, made, strict=True))


class _Replayed(Interpreter):
    """Runs plain operators; what they make is traced back to the nodes of the region."""

    def run_node(self, n: Node) -> Any:
        with fx_traceback.set_current_meta(n):
            return super().run_node(n)


def regions_of(module: GraphModule, around: Regions = ()) -> dict[Node, Region]:
    """The regions of a graph, and of the bodies in it, by their first nodes. around: of autocast, at its beginning.

    To be called under the fake mode of the graph, outside of any tracing. Raises UnsupportedError for a region that
    cannot be read: it draws random numbers, switches gradients off, or calls other graphs.
    """
    if not any(nesting(n) for n in _all_nodes(module)):
        return {}
    found: dict[Node, Region] = {}
    opened = list(around)
    held: list[Node] = []
    depth = 0
    for node in module.graph.nodes:
        depth += nesting(node)
        if depth or held:
            held.append(node)
        elif node.target is torch.amp.autocast_mode._enter_autocast:
            opened.append(tuple(node.args))
        elif node.target is torch.amp.autocast_mode._exit_autocast:
            opened.pop()
        elif is_call(node):
            found |= _inside(module, node, tuple(opened))
        if held and not depth:
            found[held[0]] = _lowered(module, held, tuple(opened))
            held = []
    return found


def _all_nodes(module: GraphModule) -> Iterator[Node]:
    for part in module.modules():
        if isinstance(part, GraphModule):
            yield from part.graph.nodes


def _inside(module: GraphModule, call: Node, opened: Regions) -> dict[Node, Region]:
    """The regions in the body of a higher-order operator that is run as a part of the graph."""
    args = [_fetched(module, a) for a in call.args]
    place = body_of(args)
    if place is None:
        return {}
    own = region(call.target, args)
    return regions_of(args[place], (*opened, *((own,) if own else ())))


def _fetched(module: GraphModule, value: Any) -> Any:
    is_held = isinstance(value, Node) and value.op == "get_attr"
    return attribute(module, str(value.target)) if is_held else value


def _lowered(module: GraphModule, nodes: Sequence[Node], opened: Regions) -> Region:
    inside = set(nodes)
    _check(nodes)
    given = tuple(dict.fromkeys(i for n in nodes for i in n.all_input_nodes if i not in inside))
    results = tuple(n for n in nodes if any(user not in inside for user in n.users))
    values = [
        _known(node) if node.op != "get_attr" else attribute(module, str(node.target)) for node in given
    ]
    missing = next((node for node, value in zip(given, values, strict=True) if value is None), None)
    if missing is not None:
        raise UnsupportedError(
            f"{missing.name} comes into torch.vmap{line_of(nodes[0])} without an example value"
        )

    def run(*held: Any) -> list[Any]:
        return _run(module, nodes, dict(zip(given, held, strict=True)), results)

    with ExitStack() as entered, torch.no_grad(), fx_traceback.preserve_node_meta():
        for args in opened:
            entered.enter_context(torch.amp.autocast_mode.autocast(*args))
        flat = make_fx(run, _allow_non_fake_inputs=True)(*values)
    _check_plain(flat, nodes[0])
    return Region(tuple(nodes), given, results, flat)


def _check(nodes: Sequence[Node]) -> None:
    """Raises UnsupportedError for what plain operators would not show."""
    for node in nodes:
        if isinstance(node.target, HigherOrderOperator) or node.op == "call_module":
            raise UnsupportedError(
                f"torch.vmap runs over {node.name}{line_of(node)}, which calls another graph"
            )
        if node.target is torch._C._set_grad_enabled or "autocast" in str(node.target):
            raise UnsupportedError(
                f"gradients or autocast are switched inside torch.vmap{line_of(node)}; switch them around it"
            )


def _run(
    module: GraphModule, nodes: Sequence[Node], env: Mapping[Node, Any], results: Sequence[Node]
) -> list[Any]:
    """Runs the region node by node; the transform's stack is afterwards as it was, whatever happens."""
    functorch = torch._C._functorch
    runner = Interpreter(module, garbage_collect_values=False)
    runner.env = dict(env)
    before = functorch.get_dynamic_layer_stack_depth()
    try:
        for node in nodes:
            with fx_traceback.set_current_meta(node):
                runner.env[node] = runner.run_node(node)
    finally:
        functorch.pop_dynamic_layer_stack_and_undo_to_depth(before)
    values = [runner.env[node] for node in results]
    if any(isinstance(v, Tensor) and functorch.is_batchedtensor(v) for v in pytree.tree_leaves(values)):
        raise UnsupportedError(f"a value leaves torch.vmap{line_of(nodes[0])} that belongs to it")
    return values


def _check_plain(flat: GraphModule, first: Node) -> None:
    """Random numbers would be drawn once more, and be others."""
    for node in flat.graph.nodes:
        if _is_random(node):
            raise UnsupportedError(
                f"random numbers are drawn inside torch.vmap{line_of(first)}; draw them outside and pass them in"
            )


def _is_random(node: Node) -> bool:
    """Whether a call draws random numbers; one with a dropout of probability 0 may, by its kind, but does not."""
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    names = [argument.name for argument in target._schema.arguments]
    held = {a.name: a.default_value for a in target._schema.arguments}
    held |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return held.get("dropout_p", held.get("p")) != 0 and held.get("train") is not False


def _known(node: Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))
