"""The report as plain text, 100 columns wide or as wide as asked; no colour, no terminal needed."""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from attnopt.report import Report, SiteReport
from attnopt.report_groups import Group, group, worst

WIDTH, NARROWEST = 100, 72
_INDENT = "     "
_COUNT, _VERDICT, _CHECK, _KERNEL = 5, 12, 16, 16  # widths of columns; the rest is for the name of the site


def render(report: Report, width: int = WIDTH) -> str:
    """Sites that are rewritten, kept, left alone with the reason, or no attention; breaks, warnings, totals."""
    page = _Page(max(width, NARROWEST))
    blocks = [
        page.rewritten(report.having("rewritten")),
        page.kept(report.having("kept")),
        page.left_alone(report.having("refused", "quarantined")),
        page.not_attention(report.having("rejected"), cut=bool(report.graph_breaks)),
        page.listed("graph breaks (an attention that spans one cannot be found)", report.graph_breaks),
        page.listed("warnings", report.warnings),
        page.listed(f"evaluated on {report.evaluation.get('text')}", tuple(_evaluated(report))),
        page.wrap(summary(report), "", ""),
    ]
    return _printable("\n\n".join(block for block in blocks if block))


def _evaluated(report: Report) -> Iterator[str]:
    """What the rewrite costs on a text."""
    found = {name: value for name, value in report.evaluation.items() if isinstance(value, int | float)}
    if {"perplexity_before", "perplexity_after", "perplexity_change", "logits_error"} <= {*found}:
        before, after = found["perplexity_before"], found["perplexity_after"]
        yield f"perplexity {before:.5g} -> {after:.5g} ({100 * found['perplexity_change']:+.2f} %)"
        yield f"logits {found['logits_error']:.2e} apart, relative"
        cut = f"in pieces of {report.evaluation.get('length')} ({report.evaluation.get('tokenizer')})"
        yield f"{count(int(found.get('tokens', 0)), 'token')} predicted, {cut}"


def totals(report: Report) -> str:
    """What happened, in one sentence, broken into lines."""
    return _Page(WIDTH).wrap(summary(report), "", "")


def summary(report: Report) -> str:
    """What happened, in one sentence."""
    done, found = report.having("rewritten"), report.attention
    if not found:
        nodes = sum(graph.nodes_before for graph in report.graphs)
        seen = f" in {count(len(report.graphs), 'graph')} of {count(nodes, 'node')}" if report.graphs else ""
        head = f"no attention found{seen}"
    else:
        approximate = sum(not site.exact for site in done)
        head = f"{len(done)} of {count(len(found), 'attention site')} rewritten"
        head += f" ({len(done) - approximate} exact, {approximate} approximate)"
        head += "".join(
            f", {len(sites)} {name}" for name in ("kept", "quarantined") if (sites := report.having(name))
        )
    breaks = count(len(report.graph_breaks), "graph break")
    facts = [head, _checked(done), breaks, f"{report.total_seconds:.1f} s"]
    return "; ".join(fact for fact in facts if fact)


def count(number: int, noun: str, plural: str = "") -> str:
    """`1 site`, `2 sites`."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def check_text(group: Group) -> str:
    """What is known of the correctness of a group, in a few words."""
    if not group.first.exact:
        error = group.approximation_error
        return "approximate" if error is None else f"off by {error:.1e}"
    if group.first.verdict == "kept":
        return "unchanged"
    return "unverified" if group.error is None else f"{group.error:.1e}"


def why(site: SiteReport) -> str:
    """The reason for which a site was left alone, with how far it came."""
    reason = site.reason or "no reason given"
    if site.error is not None:
        return f"the check disagreed: {reason}"
    return f"it was read, but no kernel serves it: {reason}" if site.spec else reason


def _checked(done: Sequence[SiteReport]) -> str:
    """How the rewritten sites were checked."""
    errors = [site.error for site in done if site.error is not None]
    unverified = len(done) - len(errors)
    checked = f"checked in fp64, worst row error {worst(errors):.0e}" if errors else ""
    return ", ".join(part for part in (checked, f"{unverified} unverified" if unverified else "") if part)


@dataclass(frozen=True, slots=True)
class _Page:
    """Lays out blocks of text; width: columns."""

    width: int

    @property
    def rule(self) -> str:
        return "-" * self.width

    def rewritten(self, sites: Sequence[SiteReport]) -> str:
        """The table of what was done."""
        if not sites:
            return ""
        head = self.row("", "attention site", "verdict", "check", "kernel")
        return "\n".join([head, self.rule, *(line for found in group(sites) for line in self._done(found))])

    def kept(self, sites: Sequence[SiteReport]) -> str:
        """What is served well as it is."""
        return self.block(f"kept as they are: {count(len(sites), 'site')}", map(self._kept, group(sites)))

    def left_alone(self, sites: Sequence[SiteReport]) -> str:
        """What was not rewritten, with the line, the reason and what would help."""
        return self.block(f"left alone: {count(len(sites), 'site')}", map(self._refusal, group(sites)))

    def not_attention(self, sites: Sequence[SiteReport], *, cut: bool) -> str:
        """What only looked like attention, in a line each; cut: whether a break may hide the rest of it."""
        rows = [
            f"{len(f.sites)}x {f.first.where}{f'  {f.modules}' if f.modules else ''}: {f.first.code or f.first.reason}"
            for f in group(sites)
        ]
        title = "looked like attention and is not" + (", as far as its graph goes" if cut else "")
        return self.listed(title, rows)

    def block(self, title: str, entries: "Sequence[str] | map[str]") -> str:
        """A title, a rule, and the entries; nothing without entries."""
        held = list(entries)
        return "\n".join([title, self.rule, *held]) if held else ""

    def listed(self, title: str, lines: Sequence[str]) -> str:
        """A title and a list."""
        return "\n".join([f"{title}:", *(self.wrap(line, "  ", _INDENT) for line in lines)]) if lines else ""

    def _done(self, found: Group) -> list[str]:
        site = found.first
        place = f"at {site.where}" if found.modules else ""
        details = "  ".join(part for part in (site.spec, place) if part)
        number, name = f"{len(found.sites)}x", found.modules or site.where
        row = self.row(number, name, site.verdict, check_text(found), site.kernel or "-")
        # The reason is a waiver here, or why an approximation was not used.
        return [row, *(self.wrap(text, _INDENT, _INDENT) for text in (details, site.reason) if text)]

    def _kept(self, found: Group) -> str:
        site = found.first
        details = "; ".join(part for part in (site.spec, site.kernel or "", site.reason) if part)
        return "\n".join([self._place(found), self.wrap(details, _INDENT, _INDENT)])

    def _refusal(self, found: Group) -> str:
        site = found.first
        lines = [self._place(found)]
        if site.code:
            lines.append(_INDENT + _shorten(site.code, self.width - len(_INDENT)))
        lines.append(self.wrap(f"{site.verdict}: {why(site)}", _INDENT, _INDENT + "  "))
        if site.advice:
            lines.append(self.wrap(f"what would help: {site.advice}", _INDENT, _INDENT + "  "))
        hints = [
            ("read as" if site.error is not None else "read so far", site.spec),
            ("nearest rule", site.nearest_rule),
            ("stopped at", found.node),
        ]
        told = "; ".join(f"{name}: {value}" for name, value in hints if value)
        return "\n".join([*lines, *([self.wrap(told, _INDENT, _INDENT + "  ")] if told else [])])

    def _place(self, found: Group) -> str:
        place = f"{f'{len(found.sites)}x':<{_COUNT}}{found.first.where}"
        left = self.width - len(place) - 2
        return (
            f"{place}  {_shorten(found.modules, left)}".rstrip() if left > 10 else _shorten(place, self.width)
        )

    def row(self, number: str, name: str, verdict: str, check: str, kernel: str) -> str:
        """One line of the table of rewritten sites."""
        wide = self.width - _COUNT - _VERDICT - _CHECK - _KERNEL - 3
        row = f"{number:<{_COUNT}}{_shorten(name, wide):<{wide}} {verdict:<{_VERDICT}} {check:<{_CHECK}} "
        return (row + _shorten(kernel, self.width - len(row))).rstrip()

    def wrap(self, text: str, first: str, rest: str) -> str:
        """A paragraph."""
        return textwrap.fill(
            text, self.width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
        )  # fmt: skip


def _shorten(text: str, width: int) -> str:
    """One line of at most `width` columns; the middle gives way, since both ends of a path tell most."""
    text = " ".join(text.split())
    if len(text) <= width:
        return text
    keep = width - 3
    return f"{text[: keep // 3]}...{text[len(text) - (keep - keep // 3) :]}"


def _printable(text: str) -> str:
    """Without control characters: a report may come from a file, and a terminal obeys them."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)
