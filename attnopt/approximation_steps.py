"""Measures approximate decoding steps on the very inputs with which torch.compile comes, once, while compiling."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from attnopt.approximation import _Errors
from attnopt.passes.cached import writers
from attnopt.passes.sizes import hint
from attnopt.pipeline import Edit
from attnopt.report import Report

#: Bytes of inputs that may be copied, because the graph writes to them. A cache beyond that is not measured.
MOST_COPIED = 2**30


def measured(report: Report, edits: Sequence[Edit], module: GraphModule, inputs: Sequence[Any]) -> Report:
    """The report with `approximation_error` of each decoding step of `module` that SparQ approximates.

    As `approximation.measure`, on `inputs`, which stay as they are. Only steps: their graphs run in no time, and their
    exact scores fit. Where it cannot be run the error stays unknown.
    """
    steps = [edit for edit in edits if edit.spec.sparse is not None and edit.shadow.original is module]
    copies = _copies(steps[0], inputs) if steps else None
    if copies is None:
        return report
    errors = _Errors(steps)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            errors.run(*copies)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return report
    sites = list(report.sites)
    for edit in steps:
        sites[edit.report] = replace(sites[edit.report], approximation_error=errors.found[edit.report])
    return replace(report, sites=tuple(sites))


def _copies(edit: Edit, inputs: Sequence[Any]) -> list[Any] | None:
    """The inputs, those that the graph writes to as copies; None where there are no values, or too many to copy."""
    holders = [n for n in edit.shadow.module.graph.nodes if n.op == "placeholder"]
    if len(holders) != len(inputs) or any(isinstance(x, FakeTensor) for x in inputs):
        return None
    written = [_is_written(n) for n in holders]
    if sum(x.nbytes for x, late in zip(inputs, written, strict=True) if late) > MOST_COPIED:
        return None
    return [_value(x, copied=late) for x, late in zip(inputs, written, strict=True)]


def _is_written(holder: Node) -> bool:
    return isinstance(holder.meta.get("val"), Tensor) and any(True for _ in writers(holder))


def _value(given: Any, *, copied: bool) -> Any:
    if isinstance(given, torch.SymInt):
        return hint(given)
    return given.clone() if copied else given
