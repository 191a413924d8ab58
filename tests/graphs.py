"""Graphs of plain functions, as the passes see them: traced, shadowed, read."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.backend import attnopt, reports
from attnopt.pipeline import Found, read
from attnopt.registry import rules
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow, trace

Function = Callable[..., Any]


def aten_graph(function: Function, *inputs: Any, dynamic: bool = False) -> GraphModule:
    """The graph as torch.export makes it: ATen before autograd and decompositions, with fake values."""
    mode = "symbolic" if dynamic else "fake"
    return make_fx(function, pre_dispatch=True, tracing_mode=mode)(*inputs)


def dynamo_graphs(function: Function, *inputs: Any, dynamic: bool | None = False) -> list[GraphModule]:
    """The graphs that torch.compile hands to its backend."""
    found: list[GraphModule] = []

    def keep(module: GraphModule, example_inputs: list[Any]) -> Function:
        found.append(copy.deepcopy(module))
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, dynamic=dynamic)(*inputs)
    return found


def shadow_of(function: Function, *inputs: Any, dynamic: bool = False) -> Shadow:
    return trace(aten_graph(function, *inputs, dynamic=dynamic))


def found_in(function: Function, *inputs: Any, dynamic: bool = False) -> list[Found]:
    """Every anchor and what was read there."""
    return list(read(shadow_of(function, *inputs, dynamic=dynamic), rules()))


def site_of(function: Function, *inputs: Any, dynamic: bool = False) -> Site:
    """The one site of a function."""
    (found,) = found_in(function, *inputs, dynamic=dynamic)
    assert found.site is not None, found.reject
    return found.site


def reject_of(function: Function, *inputs: Any, dynamic: bool = False) -> Reject:
    """Why the one anchor of a function is no site."""
    (found,) = found_in(function, *inputs, dynamic=dynamic)
    assert found.reject is not None
    return found.reject


def nodes_of(module: GraphModule, target: object) -> list[Node]:
    """The nodes that call `target`, in order."""
    return [node for node in module.graph.nodes if node.target == target]


def rewritten(function: Function, *inputs: Any, **options: object) -> Function:
    """`function`, traced for these inputs, with its attention replaced; nothing else is compiled."""
    module = aten_graph(function, *inputs)
    run = attnopt(module, list(inputs), options={"inner": "eager", **options})
    assert reports()[-1].warnings == ()
    return run
