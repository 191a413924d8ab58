"""`torch.compile(model, backend="attnopt")`: the passes, then the compiler for the rest; any failure falls back."""

import copy
import threading
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import Graph, GraphModule

from attnopt import breaks
from attnopt.approximation_steps import measured
from attnopt.buffers import note_on, offer, offer_noted
from attnopt.errors import OptionError, StrictError, UnsupportedError
from attnopt.guards import Either, Guarded, Holds, Noting, guards_of, notes_of
from attnopt.options import Options
from attnopt.passes.mask_handed import forms_made
from attnopt.pipeline import Edit, Outcome, optimise
from attnopt.premises import premises
from attnopt.report import Report
from attnopt.report_groups import short_node
from attnopt.report_text import why
from attnopt.shadow import sub_graphs
from attnopt.versions import versions
from attnopt.watch import Watched
from attnopt.wording import advised

Compiled = Callable[..., Any]

#: The last reports of this process, for `attnopt.reports()`. The only state that outlives a compilation.
_KEPT = 1024
_history: deque[Report] = deque(maxlen=_KEPT)
_lock = threading.Lock()


def attnopt(
    module: GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, object] | None = None,
    mode: str | None = None,
) -> Compiled:
    """The backend that `torch.compile` calls for each graph.

    module: a Dynamo graph. inputs: its example inputs. options: see `attnopt.Options`. mode: as for torch.compile
    with Inductor, which gets it.

    Raises OptionError, and StrictError with `strict=True`; everything else falls back to the untouched graph.
    """
    from torch._dynamo.exc import RestartAnalysis

    chosen = Options.parse(options)
    settings = inner_settings(mode, chosen)
    spare = _copied(module) if any(note_on(value) is not None for value in inputs) else None
    offer_noted(module, inputs)
    work = _Work(module, inputs, chosen, settings)
    report, edits = work.rewritten()
    if chosen.verify != "off":
        report = measured(report, edits, module, inputs)
    report = with_graph_breaks(report, breaks.of_graph(module))
    keep(report)
    if chosen.strict:
        check_strict(report)
    try:
        compiled = work.compiled(edits)
        notes = notes_of(module) if edits else []
        if notes and spare is not None:
            plain = _Work(spare, inputs, chosen, settings)
            compiled = Either(compiled, plain.compiled(plain.rewritten()[1]), notes)
    except RestartAnalysis:  # Dynamo traces the function once more, and asks again
        _forget(report)
        raise
    proven = module.meta.get(PROVEN)
    return Noting(compiled, proven) if proven else compiled


def inner_settings(mode: str | None, options: Options) -> dict[str, Any]:
    """What a mode of torch.compile means to Inductor. Raises OptionError for no mode, and where Inductor is not."""
    if mode is None or mode == "default":
        return {}
    if options.inner != "inductor":
        raise OptionError(
            f"mode={mode!r} is for inner='inductor', and inner is {options.inner!r}; leave out one"
        )
    from torch._inductor import list_mode_options

    try:
        return list_mode_options(mode)
    except RuntimeError as problem:
        raise OptionError(str(problem)) from problem


class _Work:
    """One graph on its way. settings: of Inductor. original, before: as it was, for checks at run time."""

    def __init__(
        self, module: GraphModule, inputs: Sequence[Any], options: Options, settings: Mapping[str, Any]
    ) -> None:
        self.module, self.inputs, self.options, self.settings = module, inputs, options, settings
        self.original = copy.deepcopy(module) if options.verify in _AT_RUN_TIME else None
        self.before = _snapshot(module.graph) if offer(module, inputs) else None

    def rewritten(self) -> tuple[Report, tuple[Edit, ...]]:
        return rewrite_graph(self.module, self.options, gradient=torch.is_grad_enabled())

    def compiled(self, edits: tuple[Edit, ...]) -> Compiled:
        """What runs it, behind the checks that what was read of it needs."""
        compiled = _compile_rest(self.module, self.inputs, self.options, self.settings)
        if self.original is not None and edits:
            compiled = Watched(compiled, self.original, edits, self.options)
        guards: list[Holds] = [*guards_of(self.module), *premises(self.module, edits)] if edits else []
        if self.before is None or not guards:
            return compiled
        return Guarded(compiled, GraphModule(self.module, self.before), guards)


def _copied(module: GraphModule) -> GraphModule:
    copied = copy.deepcopy(module)
    copied.graph = _snapshot(module.graph)
    return copied


#: Key in the metadata of a graph: what was proven of its results.
PROVEN = "attnopt_proven"
_AT_RUN_TIME = ("first", "sample", "always")


def rewrite_graph(
    module: GraphModule, options: Options, *, gradient: bool
) -> tuple[Report, tuple[Edit, ...]]:
    """Rewrites `module` in place and reports; on any failure puts every graph back as it was and reports that.

    gradient: whether autograd will follow. Tracing is not thread-safe: one graph at a time, under torch's own lock.
    What the passes compute is no part of the model: where a checkpoint is around it, its hooks must not see tensors
    that are saved here.
    """
    from torch._dynamo.convert_frame import compile_lock

    saved = [(body, _snapshot(body.graph)) for body in _all_graphs(module)]
    try:
        with compile_lock, saved_tensors_hooks(_as_it_is, _as_it_is):
            module.meta[PROVEN] = forms_made(module)
            outcome = optimise(module, options, gradient=gradient)
    except Exception as problem:  # noqa: BLE001 - fail closed: a bug here must never break the user's model
        _restore(saved)
        message = f"attnopt left a graph untouched: {_told(problem)}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return make_report(Outcome((), ()), options, warnings=(message,)), ()
    return make_report(outcome, options), outcome.edits


def _as_it_is(saved: Tensor) -> Tensor:
    return saved


def _told(problem: Exception) -> str:
    """What stopped attnopt, in one line; the tracer appends the node at which it was."""
    first = str(problem).partition("\n")[0]
    return first if isinstance(problem, UnsupportedError) else f"{type(problem).__name__}: {first}"


def make_report(outcome: Outcome, options: Options, warnings: tuple[str, ...] = ()) -> Report:
    """The outcome of the passes as a Report."""
    return Report(
        sites=tuple(map(advised, outcome.sites)),
        graphs=outcome.graphs,
        options=options.to_dict(),
        versions=versions(),
        warnings=warnings,
    )


def keep(report: Report) -> None:
    """Adds a report to the history."""
    with _lock:
        _history.append(report)


def _forget(report: Report) -> None:
    with _lock:
        kept = [other for other in _history if other is not report]
        _history.clear()
        _history.extend(kept)


def reports() -> tuple[Report, ...]:
    """The reports of the compilations so far in this process, oldest first (at most the last 1,024)."""
    with _lock:
        return tuple(_history)


def check_strict(report: Report) -> None:
    """Raises StrictError if an attention site was left alone, or if attnopt itself failed."""
    left = report.having("refused", "quarantined")
    if left:
        site = left[0]
        what = f"{site.where}: `{site.code}`" if site.code else site.where
        named = f" in {site.module}" if site.module else ""
        raise StrictError(
            f"strict=True and {len(left)} attention site(s) were left alone; the first is {what}{named}: {why(site)} "
            f"(rule {site.nearest_rule}, node {short_node(site.node) or '?'}). "
            f"What would help: {site.advice or 'nothing yet'}; or drop strict=True."
        )
    if report.warnings:
        raise StrictError(f"strict=True and {report.warnings[0]}")


def with_graph_breaks(report: Report, reasons: Sequence[str]) -> Report:
    """The report with the reasons for which Dynamo cut the graph."""
    return replace(report, graph_breaks=tuple(reasons))


def _all_graphs(module: GraphModule) -> list[GraphModule]:
    return [module, *(g for body in sub_graphs(module) for g in _all_graphs(body))]


def _snapshot(graph: Graph) -> Graph:
    """A copy; Dynamo keeps facts about inputs as attributes of their nodes, which copying a graph leaves behind."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        for name, value in vars(old).items():
            vars(new).setdefault(name, value)
    return copied


def _restore(saved: Sequence[tuple[GraphModule, Graph]]) -> None:
    for body, graph in saved:
        body.graph = graph
        body.recompile()


def _compile_rest(
    module: GraphModule, inputs: Sequence[Any], options: Options, settings: Mapping[str, Any]
) -> Compiled:
    """The rest of the graph to the inner compiler; its cache keys are made from the rewritten graph."""
    from torch._dynamo.backends.registry import lookup_backend

    given = {"config_patches": dict(settings)} if settings else {}
    compiled: Compiled = lookup_backend(options.inner)(module, list(inputs), **given)
    return compiled
