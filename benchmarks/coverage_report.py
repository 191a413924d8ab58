"""The figures and the table from the rows of the coverage benchmark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coverage_modes import Mode

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Figures:
    """One line of the table. sites: by structure; a site that Dynamo leaves out of every graph counts as left alone.

    linear_otherwise: of the linear sites, those left alone because their recurrence is of another family.
    """

    family: str
    mode: str
    models: int
    softmaxes: int
    sites: int
    rewritten: int
    inductor: int | None
    linear: int
    linear_rewritten: int
    linear_otherwise: int
    unexplained: int
    wrong: int
    crashes: int
    untouched: int
    breaks: int
    causal: int
    proven: int
    seconds: float

    @property
    def share(self) -> float:
        """Of the sites, rewritten or kept."""
        return self.rewritten / self.sites if self.sites else 0.0


def figures(rows: Rows) -> list[Figures]:
    """By family and mode, in the order in which they come."""
    structural = structural_counts(rows)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["family"], row["mode"]), []).append(row)
    return [_figures(family, mode, group, structural) for (family, mode), group in groups.items()]


def _figures(family: str, mode: str, rows: Rows, structural: Mapping[tuple[str, str], int]) -> Figures:
    ran = [row for row in rows if "error" not in row]
    sites = {id(row): sites_of(row, structural) for row in ran}
    asked = [row["inductor"] for row in ran if row.get("inductor") is not None]
    return Figures(
        family, mode, len(ran), sum(row.get("softmaxes", 0) for row in ran), sum(sites.values()),
        sum(min(done(row), sites[id(row)]) for row in ran), sum(asked) if asked else None,
        sum(sum(row.get("linear", {}).values()) for row in ran),
        sum(row.get("linear", {}).get("rewritten", 0) for row in ran), sum(_otherwise(row) for row in ran),
        sum(unexplained(row, sites[id(row)]) for row in ran), sum(bool(row.get("wrong")) for row in ran),
        *(sum(bool(row.get(name)) for row in ran) for name in ("crashes", "untouched", "breaks")),
        *_sum_proven(ran, sites), _median([_reading(row) for row in ran]),
    )  # fmt: skip


def structural_counts(rows: Rows) -> dict[tuple[str, str], int]:
    """(model, spelling of attention) -> sites by structure; no other part of a mode changes them."""
    return {
        (row["name"], Mode.parse(row["mode"]).attention): row["structural"]
        for row in rows
        if row.get("structural") is not None
    }


def sites_of(row: Mapping[str, Any], structural: Mapping[tuple[str, str], int]) -> int:
    """By structure where that could be counted, else the softmaxes that ran; no fewer than attnopt rewrote."""
    known = structural.get((row["name"], Mode.parse(row["mode"]).attention))
    if known is None or row["family"] == "decoys" or (known == 0 and row.get("breaks")):
        return int(row.get("softmaxes", 0))
    return max(known, done(row))


def done(row: Mapping[str, Any]) -> int:
    """Softmax sites rewritten, or kept as the best call there is."""
    verdicts = row.get("verdicts", {})
    return int(verdicts.get("rewritten", 0) + verdicts.get("kept", 0))


#: In reasons why a recurrence is none of the lightning kernel's family: delta rules, gates by channel, mLSTM.
OTHERWISE = ("which no kernel states", "so it is not linear in the queries")


def _otherwise(row: Mapping[str, Any]) -> int:
    left = [(reason, times) for _, family, reason, _, times in row.get("left", []) if family == "linear"]
    return sum(times for reason, times in left if any(said in reason for said in OTHERWISE))


def _reported(row: Mapping[str, Any]) -> int:
    return sum(row.get("verdicts", {}).values())


def unexplained(row: Mapping[str, Any], sites: int) -> int:
    """Sites that no line of the report tells of. A graph break, or what left a whole graph untouched, is a reason."""
    if any(row.get(name) for name in ("breaks", "crashes", "untouched")):
        return 0
    without_text = sum(times for *_, reason, _, times in row.get("left", []) if not reason)
    return max(0, sites - _reported(row)) + without_text


def proven(row: Mapping[str, Any], sites: int) -> tuple[int, int]:
    """Rewritten softmaxes that were causal when run, and how many of their masks hold a proven causal part."""
    causal = min(row.get("causal", 0), done(row), sites)
    return causal, min(causal, sum(n for spec, n in row.get("specs", {}).items() if "causal" in spec))


def _sum_proven(rows: Rows, sites: Mapping[int, int]) -> tuple[int, int]:
    both = [proven(row, sites[id(row)]) for row in rows]
    return sum(causal for causal, _ in both), sum(known for _, known in both)


def _reading(row: Mapping[str, Any]) -> float:
    seconds = row.get("seconds", {})
    return sum(seconds.get(name, 0.0) for name in ("read", "choose", "validate"))


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def line(row: Mapping[str, Any]) -> str:
    """One row as it comes, for the log."""
    told = (
        row.get("error")
        or f"{row.get('softmaxes', 0)} softmaxes: {row.get('verdicts', {})} {row.get('linear', '')}"
    )
    bad = "".join(f" {name.upper()} {row[name]}" for name in ("wrong", "crashes") if row.get(name))
    return f"{row['family']:9} {row['name'][:40]:40} {row['mode']:29} {told[:150]}{bad[:300]}"


HEADERS = (
    "family", "mode", "models", "softmaxes", "sites", "rewritten", "share", "Inductor", "linear", "causal proven",
    "unexplained", "wrong", "crashes", "untouched", "graph breaks", "reading, s",
)  # fmt: skip


def _cells(f: Figures) -> tuple[str, ...]:
    inductor = "-" if f.inductor is None else f"{f.inductor} ({f.inductor / max(f.sites, 1):.1%})"
    stated = f"{f.linear_rewritten}/{f.linear - f.linear_otherwise}" if f.linear else "-"
    linear = f"{stated} (+{f.linear_otherwise})" if f.linear_otherwise else stated
    proven = f"{f.proven}/{f.causal}" if f.causal else "-"
    counts = (f.unexplained, f.wrong, f.crashes, f.untouched, f.breaks)
    return (
        f.family, f.mode, str(f.models), str(f.softmaxes), str(f.sites), str(f.rewritten), f"{f.share:.1%}", inductor,
        linear, proven, *map(str, counts), f"{f.seconds:.3f}",
    )  # fmt: skip


def table(payload: Mapping[str, Any]) -> str:
    """The figures as a Markdown table."""
    lines = [HEADERS, tuple("---" for _ in HEADERS), *(_cells(f) for f in figures(payload["rows"]))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def status(payload: Mapping[str, Any]) -> int:
    """1 if a result is wrong, attnopt crashed, a decoy was rewritten or a site has no reason; else 0."""
    found = figures(payload["rows"])
    bad = any(f.wrong or f.crashes or f.unexplained or (f.family == "decoys" and f.rewritten) for f in found)
    return int(bad)
