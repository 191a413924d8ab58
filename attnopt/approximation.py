"""Measures, on a program's own example inputs, how far each approximate site is from the attention it stands for."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

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
    inputs = program._get_flat_args_with_constants(args, kwargs)  # type: ignore[attr-defined]  # noqa: SLF001
    sites = list(report.sites)
    for edit in approximate:
        sites[edit.report] = replace(sites[edit.report], approximation_error=_error(edit, inputs))
    return replace(report, sites=tuple(sites))


class _Until(Interpreter):
    """Runs a shadow far enough to have the values of some nodes."""

    def __init__(self, edit: Edit, wanted: Sequence[Node]) -> None:
        super().__init__(edit.shadow.module)
        self.wanted = set(wanted)
        self.kept: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = value
        return value


def _error(edit: Edit, inputs: Sequence[Any]) -> float:
    wanted = emit.leaves(edit.site)
    runner = _Until(edit, wanted)
    with torch.no_grad():
        runner.run(*inputs)
        values = [runner.kept[node] for node in wanted]
        exact = emit.call(edit.site, edit.site.spec, REFERENCE.run, values)
        near = emit.call(edit.site, edit.spec, edit.kernel.run, values)
    return _relative(near, exact)


def _relative(near: Tensor, exact: Tensor) -> float:
    scale = float(exact.double().norm())
    return float((near.double() - exact.double()).norm()) / max(scale, 1e-30)


