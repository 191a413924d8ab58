"""Measures, on a program's own example inputs, how far each approximate site is from the attention it stands for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Interpreter, Node

from attnopt.kernels.reference.kernel import KERNEL as REFERENCE
from attnopt.passes import emit
from attnopt.pipeline import Edit
from attnopt.report import Report


def measure(report: Report, edits: Sequence[Edit], program: ExportedProgram) -> Report:
    """The report with `approximation_error` filled in: ||approximate - exact|| / ||exact|| over the whole output.

    Exact sites have none. Nothing is measured for a program that was exported without example inputs.
    """
    approximate = [edit for edit in edits if not report.sites[edit.report].exact]
    if not approximate or program.example_inputs is None:
        return report
    args, kwargs = program.example_inputs
    inputs = program._graph_module_flat_inputs(args, kwargs)
    errors = _Errors(approximate)
    with torch.no_grad():
        errors.run(*inputs)
    sites = list(report.sites)
    for edit in approximate:
        sites[edit.report] = replace(sites[edit.report], approximation_error=errors.found[edit.report])
    return replace(report, sites=tuple(sites))


class _Errors(Interpreter):
    """Runs a shadow once, and measures each approximate site when the walk has come to its root.

    found: the error of each edit, by its place in the report.
    """

    def __init__(self, edits: Sequence[Edit]) -> None:
        super().__init__(edits[0].shadow.module)
        self.user_to_last_uses = _last_uses(self.graph)
        self.at_root = {edit.site.root: edit for edit in edits}
        self.needed = {node for edit in edits for node in emit.leaves(edit.site)}
        self.kept: dict[Node, Any] = {}
        self.found: dict[int, float] = {}

    def run_node(self, n: Node) -> Any:
        if n.op == "output":
            return None
        value = super().run_node(n)
        if n in self.needed:
            self.kept[n] = value
        if n in self.at_root:
            edit = self.at_root[n]
            self.found[edit.report] = _error(edit, [self.kept[leaf] for leaf in emit.leaves(edit.site)])
        return value


def _last_uses(graph: Graph) -> dict[Node, list[Node]]:
    """The values that nobody reads after a node. The output does not count: a shadow returns each value it makes,
    and a long text has not the memory for the scores of all layers at once.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    last: dict[Node, list[Node]] = {}
    for node in (n for n in graph.nodes if n.op != "output"):
        readers = [user for user in node.users if user.op != "output"]
        last.setdefault(max(readers, key=order.__getitem__, default=node), []).append(node)
    return last


def _error(edit: Edit, values: Sequence[Any]) -> float:
    exact = emit.call(edit.site, edit.site.spec, REFERENCE.run, values)
    near = emit.call(edit.site, edit.spec, edit.kernel.run, values)
    return _relative(near, exact)


def _relative(near: Tensor, exact: Tensor) -> float:
    scale = float(exact.double().norm())
    return float((near.double() - exact.double()).norm()) / max(scale, 1e-30)
