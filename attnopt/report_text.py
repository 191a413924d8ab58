"""The report as a plain table of at most 100 columns; no colour, no terminal needed."""

import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from attnopt.report import Report, SiteReport

WIDTH = 100
_INDENT = "     "
_CALL, _VERDICT, _CHECK = 48, 12, 16  # widths of the columns that follow the count


@dataclass(frozen=True, slots=True)
class Group:
    """Sites that differ only in where in the model they sit."""

    first: SiteReport
    sites: tuple[SiteReport, ...]

    @property
    def modules(self) -> str:
        """The module paths in one expression: `layers.{0-29}.attn`."""
        return fold_paths([site.module for site in self.sites])

    @property
    def error(self) -> float | None:
        """The worst error of the checks, or None if some site was not checked."""
        return worst(site.error for site in self.sites)

    @property
    def approximation_error(self) -> float | None:
        """The worst measured distance of the approximation from the original."""
        return worst(site.approximation_error for site in self.sites)


def render(report: Report) -> str:
    """The table: sites that are served, sites left alone with the reason, what is not attention, totals."""
    blocks = [
        _served(report.having("rewritten", "kept")),
        _left_alone(report.having("refused", "quarantined")),
        _not_attention(report.having("rejected")),
        _listed("graph breaks", report.graph_breaks),
        _listed("warnings", report.warnings),
        totals(report),
    ]
    return _printable("\n\n".join(block for block in blocks if block))


def totals(report: Report) -> str:
    """What happened, in one sentence."""
    done, found = report.having("rewritten"), report.attention
    if not found:
        head = "no attention found"
    else:
        approximate = sum(not site.exact for site in done)
        head = f"{len(done)} of {count(len(found), 'attention site')} rewritten"
        head += f" ({len(done) - approximate} exact, {approximate} approximate)"
        head += "".join(
            f", {len(sites)} {name}" for name in ("kept", "quarantined") if (sites := report.having(name))
        )
    facts = [
        head,
        _checked(done),
        count(len(report.graph_breaks), "graph break"),
        f"{report.total_seconds:.1f} s",
    ]
    return _wrap("; ".join(fact for fact in facts if fact), "", "")


def group(sites: Iterable[SiteReport]) -> list[Group]:
    """Equal sites together, in the order in which each kind first appears."""
    found: dict[SiteReport, list[SiteReport]] = {}
    for site in sites:
        found.setdefault(_alike(site), []).append(site)
    return [Group(members[0], tuple(members)) for members in found.values()]


def fold_paths(paths: Sequence[str]) -> str:
    """Paths that differ in one number as one: `a.0.b`, `a.1.b` give `a.{0-1}.b`; else the first and the last."""
    distinct = list(dict.fromkeys(path for path in paths if path))
    if len(distinct) <= 1:
        return "".join(distinct)
    split = [re.split(r"(\d+)", path) for path in distinct]
    spots = [i for i, parts in enumerate(zip(*split, strict=False)) if len({*parts}) > 1]
    if len({len(parts) for parts in split}) != 1 or len(spots) != 1 or not spots[0] % 2:
        return f"{distinct[0]} ... {distinct[-1]}"
    numbers = sorted(int(parts[spots[0]]) for parts in split)
    return "".join([*split[0][: spots[0]], f"{{{fold_numbers(numbers)}}}", *split[0][spots[0] + 1 :]])


def fold_numbers(numbers: Sequence[int]) -> str:
    """`0-5` for 0..5, `0,2..10` for even steps, else all of them."""
    steps = {b - a for a, b in pairwise(numbers)}
    if steps == {1}:
        return f"{numbers[0]}-{numbers[-1]}"
    if len(steps) == 1 and len(numbers) > 2:
        return f"{numbers[0]},{numbers[1]}..{numbers[-1]}"
    return ",".join(map(str, numbers))


def worst(errors: Iterable[float | None]) -> float | None:
    """The largest; None if there is none or one is unknown; NaN if one is NaN."""
    values = list(errors)
    known = [error for error in values if error is not None]
    if not known or len(known) != len(values):
        return None
    return math.nan if any(map(math.isnan, known)) else max(known)


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


def _alike(site: SiteReport) -> SiteReport:
    """The site without what tells equal sites apart."""
    return replace(site, module="", node="", origin=0, error=None, approximation_error=None)


def _served(sites: Sequence[SiteReport]) -> str:
    if not sites:
        return ""
    head = _row("", "attention site", "verdict", "check", "kernel")
    return "\n".join([head, "-" * WIDTH, *(line for found in group(sites) for line in _served_group(found))])


def _served_group(found: Group) -> list[str]:
    site = found.first
    name = found.modules or site.where
    place = f"at {site.where}" if found.modules else ""
    details = "  ".join(part for part in (site.spec, place) if part)
    row = _row(
        f"{len(found.sites)}x", _shorten(name, _CALL), site.verdict, check_text(found), site.kernel or "-"
    )
    noted = (
        site.reason if site.verdict == "rewritten" else ""
    )  # a waiver, or why an approximation was not used
    return [row, *(_wrap(text, _INDENT, _INDENT) for text in (details, noted) if text)]


def _row(number: str, name: str, verdict: str, check: str, kernel: str) -> str:
    name = _shorten(name, _CALL)
    row = f"{number:<5}{name:<{_CALL}} {verdict:<{_VERDICT}} {check:<{_CHECK}} "
    return (row + _shorten(kernel, WIDTH - len(row))).rstrip()


def _left_alone(sites: Sequence[SiteReport]) -> str:
    if not sites:
        return ""
    return "\n".join(
        [
            f"left alone: {count(len(sites), 'site')}",
            "-" * WIDTH,
            *(_refusal(found) for found in group(sites)),
        ]
    )


def _refusal(found: Group) -> str:
    site = found.first
    lines = [
        f"{len(found.sites)}x".ljust(5) + "  ".join(part for part in (site.where, found.modules) if part)
    ]
    if site.code:
        lines.append(_INDENT + _shorten(" ".join(site.code.split()), WIDTH - len(_INDENT)))
    lines.append(_wrap(f"{site.verdict}: {site.reason or 'no reason given'}", _INDENT, _INDENT + "  "))
    hints = [("read so far", site.spec), ("nearest rule", site.nearest_rule), ("stopped at", site.node)]
    told = "; ".join(f"{name}: {value}" for name, value in hints if value)
    return "\n".join([*lines, *([_wrap(told, _INDENT, _INDENT + "  ")] if told else [])])


def _not_attention(sites: Sequence[SiteReport]) -> str:
    if not sites:
        return ""
    rows = [f"{len(found.sites)}x {found.first.where}: {found.first.reason}" for found in group(sites)]
    return "\n".join(["looked like attention and is not:", *(_wrap(row, "  ", _INDENT) for row in rows)])


def _listed(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"{title}:", *(_wrap(line, "  ", _INDENT) for line in lines)]) if lines else ""


def _checked(done: Sequence[SiteReport]) -> str:
    """How the rewritten sites were checked."""
    errors = [site.error for site in done if site.error is not None]
    unverified = len(done) - len(errors)
    checked = f"checked in fp64, worst row error {worst(errors):.0e}" if errors else ""
    return ", ".join(part for part in (checked, f"{unverified} unverified" if unverified else "") if part)


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


def _wrap(text: str, first: str, rest: str) -> str:
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=True,
    )
