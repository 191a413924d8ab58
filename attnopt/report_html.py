"""The report as one HTML page: no script, no external host, every text escaped; light and dark."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from attnopt.errors import MissingError
from attnopt.report import GraphReport, Report, SiteReport, Verdict
from attnopt.report_groups import Group, group
from attnopt.report_text import check_text, count, summary, why

TEMPLATE = Path(__file__).parent / "report.html.jinja"

_GLYPHS = MappingProxyType(
    {"rewritten": "✓", "kept": "=", "refused": "x", "rejected": "·", "quarantined": "!"}
)
_STAGE, _GAP, _SQUARE, _PER_ROW = 110, 28, 22, 40  # sizes of the drawing, in pixels and in squares


@dataclass(frozen=True, slots=True)
class Stage:
    """One box of the pipeline."""

    name: str
    detail: str
    x: int
    width: int = _STAGE


@dataclass(frozen=True, slots=True)
class Square:
    """One site in the drawing."""

    title: str
    verdict: Verdict
    x: int
    y: int


@dataclass(frozen=True, slots=True)
class Picture:
    """The drawing of one graph."""

    title: str
    stages: tuple[Stage, ...]
    squares: tuple[Square, ...]

    @property
    def width(self) -> int:
        """Pixels."""
        return max([0, *(s.x + s.width for s in self.stages), *(s.x + _SQUARE for s in self.squares)]) + 2

    @property
    def height(self) -> int:
        """Pixels."""
        return max([70, *(square.y + _SQUARE for square in self.squares)])


@dataclass(frozen=True, slots=True)
class Section:
    """One table; `open` shows the reasons at once."""

    title: str
    groups: Sequence[Group]
    open: bool = False


def render(report: Report) -> str:
    """The page. Raises MissingError when jinja2 is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingError("the HTML report needs jinja2; pip install 'attnopt[report]'") from error
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters.update(details=lambda found: list(_details(found)), check=check_text)
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(_context(report))


def _context(report: Report) -> dict[str, object]:
    done = report.having("rewritten")
    return {
        "report": report,
        "headline": f"{len(done)} of {count(len(report.attention), 'attention site')} rewritten",
        "totals": summary(report),
        "facts": list(_facts(report)),
        "verdicts": get_args(Verdict),
        "glyphs": _GLYPHS,
        "pictures": [_picture(report, index) for index in _drawn(report)],
        "others": _others(report),
        "sections": _sections(report),
        "settings": [*_settings(report)],
    }


def _others(report: Report) -> str:
    """The graphs that are not drawn, in a few words."""
    others = len(report.graphs) - len(_drawn(report))
    return f"{count(others, 'graph')} without attention" if others else ""


def _drawn(report: Report) -> list[int]:
    """The graphs that hold sites; a report from a file may name graphs that it does not have."""
    held = {site.origin for site in report.sites}
    return [index for index in range(len(report.graphs)) if index in held]


def _sections(report: Report) -> list[Section]:
    return [
        Section("Left alone", group(report.having("refused", "quarantined")), open=True),
        Section("Rewritten", group(report.having("rewritten"))),
        Section("Kept as they are", group(report.having("kept"))),
        Section("Looked like attention and is not", group(report.having("rejected"))),
    ]


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    for verdict in get_args(Verdict):
        sites = report.having(verdict)
        if sites or verdict == "rewritten":
            yield "not attention" if verdict == "rejected" else verdict, str(len(sites))
    yield "graph breaks", str(len(report.graph_breaks))
    yield "seconds to compile", f"{report.total_seconds:.1f}"
    for name in ("bytes", "flops"):
        before, after = (_sum(report.having("rewritten"), f"{name}_{when}") for when in ("before", "after"))
        if before and after is not None:
            yield f"{name} of attention, of {amount(before)}", amount(after)


def _settings(report: Report) -> Iterator[tuple[str, str]]:
    for name, value in report.options.items():
        yield name, ", ".join(map(str, value)) or "-" if isinstance(value, list | tuple) else str(value)
    yield from report.versions.items()
    yield from ((f"seconds: {name}", f"{value:.2f}") for name, value in report.seconds.items())


def _details(found: Group) -> Iterator[tuple[str, str]]:
    """What is known of a group, without what is empty."""
    site = found.first
    told = [
        ("reason", why(site) if site.verdict in ("refused", "quarantined") else site.reason),
        ("what would help", site.advice),
        ("computes", site.spec),
        ("source", site.where),
        ("nearest rule", site.nearest_rule),
        ("stopped at", found.node),
        ("bytes", _change(found.sites, "bytes") if site.verdict == "rewritten" else ""),
        ("flops", _change(found.sites, "flops") if site.verdict == "rewritten" else ""),
        ("modules", ", ".join(s.module for s in found.sites if s.module) if len(found.sites) > 1 else ""),
    ]
    return ((name, value) for name, value in told if value)


def _change(sites: Sequence[SiteReport], name: str) -> str:
    before, after = _sum(sites, f"{name}_before"), _sum(sites, f"{name}_after")
    return "" if before is None or after is None else f"{amount(before)} before, {amount(after)} after"


def _sum(sites: Sequence[SiteReport], name: str) -> float | None:
    values = [getattr(site, name) for site in sites]
    return None if not values or None in values else float(sum(values))


def amount(value: float) -> str:
    """A count with a decimal prefix: 1.5e9 is `1.5 G`."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}"
    return f"{value:.3g}"


def _picture(report: Report, index: int) -> Picture:
    graph, sites = report.graphs[index], [site for site in report.sites if site.origin == index]
    title = f"graph {index}: {graph.nodes_before} nodes before, {graph.nodes_after} after, "
    return Picture(title + count(len(sites), "site"), _stages(graph), _squares(sites))


def _stages(graph: GraphReport) -> tuple[Stage, ...]:
    """The passes in the order in which they ran, left to right."""
    offsets = accumulate(graph.seconds, lambda x, _: x + _STAGE + _GAP, initial=0)
    return tuple(
        Stage(name, f"{seconds:.3f} s", x)
        for x, (name, seconds) in zip(offsets, graph.seconds.items(), strict=False)
    )


def _squares(sites: Sequence[SiteReport]) -> tuple[Square, ...]:
    return tuple(
        Square(_square_title(site), site.verdict, x=i % _PER_ROW * _SQUARE, y=80 + i // _PER_ROW * _SQUARE)
        for i, site in enumerate(sites)
    )


def _square_title(site: SiteReport) -> str:
    return " | ".join(
        part for part in (site.module, site.where, site.verdict, site.kernel, site.spec, site.reason) if part
    )
