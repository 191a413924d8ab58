"""Mutants that drop weights at random. A kernel draws other numbers, and its report says so; all else is compared.

The law: the report names each rate, and the same mutant without dropout gives what eager gives.
"""

import copy
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from attnopt.report import SiteReport

aten = torch.ops.aten


def rates(graph: GraphModule) -> tuple[float, ...]:
    """The probabilities of its dropout nodes that neither keep nor drop everything."""
    found = (_rate(node) for node in graph.graph.nodes)
    return tuple(rate for rate in found if 0 < rate < 1)


def _rate(node: Node) -> float:
    if node.target != aten.dropout.default or not node.args[2]:
        return 0.0
    return float(node.args[1])  # type: ignore[arg-type]


def noted(graph: GraphModule, sites: Sequence[SiteReport]) -> bool:
    """Whether it has dropout, and the report says of each rate that other random numbers are drawn."""
    said = " ".join(site.reason for site in sites if site.verdict == "rewritten")
    wanted = [f"dropout {rate:g} stays" for rate in rates(graph)]
    return bool(wanted) and all(each in said for each in wanted)


def without_dropout(graph: GraphModule) -> GraphModule:
    """A copy that keeps all weights."""
    calm = copy.deepcopy(graph)
    for node in calm.graph.nodes:
        if 0 < _rate(node) < 1:
            node.args = (node.args[0], 0.0, node.args[2])
    calm.recompile()
    return calm
