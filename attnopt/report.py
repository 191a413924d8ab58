"""Report: what was found, what became of it and why. Plain frozen data; JSON, text and HTML are made from it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Family = Literal["softmax", "linear", "other"]
Verdict = Literal["rewritten", "kept", "refused", "rejected", "quarantined"]

#: Version of the JSON form; it grows when a field changes its meaning or goes away (docs/report-schema.md).
SCHEMA = 1

#: Verdicts of sites that are attention; `rejected` ones only looked like it.
ATTENTION: tuple[Verdict, ...] = ("rewritten", "kept", "refused", "quarantined")


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport:
    """One attention-shaped site."""

    family: Family
    verdict: Verdict
    spec: str = ""  # the AttentionSpec in one line; "" when it was not read to the end
    where: str = "?"  # "file.py:123" in the user's code
    module: str = ""  # path of the nn.Module
    kernel: str | None = None  # what the site became, or what serves it when it is kept
    exact: bool = True  # False: an approximation that the user asked for
    reason: str = ""  # why it was left alone, or why this kernel
    nearest_rule: str | None = None  # the rule that understood most of a site that was left alone
    node: str = ""  # the node that stopped the reading
    code: str = ""  # the user's source line
    error: float | None = None  # of the check: worst relative row error in fp64; None: unverified
    approximation_error: float | None = (
        None  # relative, measured on the example inputs; None: exact or not measured
    )
    bytes_before: float | None = None  # device memory moved by the site
    bytes_after: float | None = None
    flops_before: float | None = None
    flops_after: float | None = None
    origin: int = 0  # index in Report.graphs
    advice: str = ""  # what would make a site that was left alone work


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphReport:
    """One captured graph."""

    nodes_before: int
    nodes_after: int
    seconds: Mapping[str, float] = field(
        default_factory=dict
    )  # per pass: shadow, read, choose, validate, splice


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that attnopt did and did not do to one model. Printing it gives the table."""

    sites: tuple[SiteReport, ...] = ()
    graphs: tuple[GraphReport, ...] = ()
    graph_breaks: tuple[str, ...] = ()  # reason and place, as Dynamo gives them
    options: Mapping[str, object] = field(default_factory=dict)  # Options.to_dict()
    versions: Mapping[str, str] = field(default_factory=dict)  # attnopt, torch, triton, python, device
    seconds: Mapping[str, float] = field(
        default_factory=dict
    )  # outside the graphs: capture, inner compiler, ...
    warnings: tuple[str, ...] = ()  # fallbacks and waivers, one sentence each
    evaluation: Mapping[str, str | float] = field(
        default_factory=dict
    )  # what the rewrite costs on a text, if asked

    def having(self, *verdicts: Verdict) -> tuple[SiteReport, ...]:
        """The sites with one of these verdicts, in the order of the graph."""
        return tuple(site for site in self.sites if site.verdict in verdicts)

    @property
    def attention(self) -> tuple[SiteReport, ...]:
        """The sites that are attention: all but the rejected ones."""
        return self.having(*ATTENTION)

    @property
    def total_seconds(self) -> float:
        """Wall-clock seconds of all passes of all graphs and of what happened around them."""
        inside = sum(sum(graph.seconds.values()) for graph in self.graphs)
        return inside + sum(self.seconds.values())

    def __str__(self) -> str:
        from attnopt.report_text import render

        return render(self)

    def to_json(self) -> str:
        """The report as JSON, the same text for equal reports; docs/report-schema.md describes it."""
        from attnopt.report_json import encode

        return encode(self)

    @staticmethod
    def from_json(text: str | bytes) -> "Report":
        """The report that `to_json` wrote. Raises ReportError for anything else."""
        from attnopt.report_json import decode

        return decode(text)

    def to_html(self) -> str:
        """One self-contained page. Raises MissingError without jinja2 (`pip install 'attnopt[report]'`)."""
        from attnopt.report_html import render

        return render(self)


def merge(reports: Iterable[Report]) -> Report:
    """Several compilations as one report; options and versions are the last one's."""
    merged = Report()
    for report in reports:
        merged = _merge(merged, report)
    return merged


def _merge(first: Report, second: Report) -> Report:
    moved = tuple(replace(site, origin=site.origin + len(first.graphs)) for site in second.sites)
    return Report(
        sites=first.sites + moved,
        graphs=first.graphs + second.graphs,
        graph_breaks=first.graph_breaks + second.graph_breaks,
        options=second.options,
        versions=second.versions,
        seconds=_added(first.seconds, second.seconds),
        warnings=tuple(dict.fromkeys(first.warnings + second.warnings)),
        evaluation=second.evaluation or first.evaluation,
    )


def _added(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in {**first, **second}}
