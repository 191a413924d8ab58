"""Measures, on a program's own example inputs, how far each approximate site is from the attention it stands for."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Interpreter, Node

from attnopt.kernels.reference.kernel import KERNEL as REFERENCE
from attnopt.passes import emit
from attnopt.passes.emit import Run
from attnopt.pipeline import Edit
from attnopt.report import Report
from attnopt.spec import AttentionSpec


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
    tokens = _tokens(edit, values)
    exact = emit.call(edit.site, edit.site.spec, _of(tokens, REFERENCE.run), values)
    near = emit.call(edit.site, edit.spec, _of(tokens, edit.kernel.run), values)
    return _relative(near, exact)


def _tokens(edit: Edit, values: Sequence[Any]) -> Tensor | None:
    """Which queries of a padded batch are no padding, (B, 1, Sq, 1); None where all are. Nobody reads the others."""
    stream = edit.spec.stream
    if stream is None or not stream.kept:
        return None
    held = emit.operands(edit.site, edit.spec, values, emit.lengths(edit.site, values))
    kept, count = held[stream.kept], held["q"].shape[2]
    at = torch.arange(count, device=kept.device) + stream.offset.at(count, kept.shape[1])
    return None if count == 1 else kept[:, at.clamp(0, kept.shape[1] - 1)][:, None, :, None]


def _of(tokens: Tensor | None, run: Run) -> Run:
    """The same, with zeros in the rows of what is no token."""
    if tokens is None:
        return run

    def masked(spec: AttentionSpec, operands: Mapping[str, Tensor]) -> Tensor:
        made = run(spec, operands)
        out = made[0] if isinstance(made, tuple) else made
        return out.masked_fill(~tokens, 0.0)

    return masked


def _relative(near: Tensor, exact: Tensor) -> float:
    scale = float(exact.double().norm())
    return float((near.double() - exact.double()).norm()) / max(scale, 1e-30)
