"""The figures, the table, the page docs/coverage.md and the plot from the rows of the coverage benchmark."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _record import ROOT
from coverage_modes import Mode

PAGE, PLOT = ROOT / "docs" / "coverage.md", ROOT / "docs" / "coverage.svg"
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Figures:
    """One line of the table. sites: by structure; a site that Dynamo leaves out of every graph counts as left alone."""

    family: str
    mode: str
    models: int
    softmaxes: int
    sites: int
    rewritten: int
    inductor: int | None
    linear: int
    linear_rewritten: int
    unexplained: int
    wrong: int
    crashes: int
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
    structural = _structural(rows)
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
        sum(row.get("linear", {}).get("rewritten", 0) for row in ran),
        sum(unexplained(row, sites[id(row)]) for row in ran), sum(bool(row.get("wrong")) for row in ran),
        sum(bool(row.get("crashes")) for row in ran), sum(bool(row.get("breaks")) for row in ran),
        *_proven(ran, sites), _median([_reading(row) for row in ran]),
    )  # fmt: skip


def _structural(rows: Rows) -> dict[tuple[str, str], int]:
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


def _more(rows: Rows) -> Iterator[str]:
    """Models in which more was rewritten than is attention by structure: a decoy, or a softmax written by hand."""
    structural = _structural(rows)
    for row in rows:
        known = structural.get((row["name"], Mode.parse(row["mode"]).attention))
        if known is not None and not row.get("breaks") and done(row) > known:
            yield f"- {row['name']}, {row['mode']}: {done(row)} rewritten, {known} sites by structure"


def done(row: Mapping[str, Any]) -> int:
    """Softmax sites rewritten, or kept as the best call there is."""
    verdicts = row.get("verdicts", {})
    return int(verdicts.get("rewritten", 0) + verdicts.get("kept", 0))


def _reported(row: Mapping[str, Any]) -> int:
    return sum(row.get("verdicts", {}).values())


def unexplained(row: Mapping[str, Any], sites: int) -> int:
    """Sites that no line of the report tells of. Where Dynamo broke the graph, the break is the reason."""
    if row.get("breaks") or row.get("crashes"):
        return 0
    without_text = sum(times for *_, reason, _, times in row.get("left", []) if not reason)
    return max(0, sites - _reported(row)) + without_text


def _proven(rows: Rows, sites: Mapping[int, int]) -> tuple[int, int]:
    """Rewritten softmaxes that were causal when run, and how many of their masks were proven causal."""
    causal = {id(row): min(row.get("causal", 0), done(row), sites[id(row)]) for row in rows}
    named = {
        id(row): sum(
            n for spec, n in row.get("specs", {}).items() if "causal" in spec and "opaque" not in spec
        )
        for row in rows
    }
    return sum(causal.values()), sum(min(causal[key], named[key]) for key in causal)


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
    "unexplained", "wrong", "crashes", "graph breaks", "reading, s",
)  # fmt: skip


def _cells(f: Figures) -> tuple[str, ...]:
    inductor = "-" if f.inductor is None else f"{f.inductor} ({f.inductor / max(f.sites, 1):.1%})"
    linear = f"{f.linear_rewritten}/{f.linear}" if f.linear else "-"
    proven = f"{f.proven}/{f.causal}" if f.causal else "-"
    counts = (f.unexplained, f.wrong, f.crashes, f.breaks)
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


def publish(path: Path) -> None:
    """Writes the page and the plot from a result."""
    payload = json.loads(path.read_text())
    PAGE.write_text(page(payload))
    plot(payload)


def page(payload: Mapping[str, Any]) -> str:
    """docs/coverage.md."""
    rows, place = payload["rows"], payload["environment"]
    parts = [
        _INTRODUCTION.format(device=place["device"], **place["versions"], commit=str(place["commit"])[:10]),
        "![Sites found by attnopt and by Inductor](coverage.svg)",
        table(payload),
        _EXPLANATION,
        "## Wrong results and crashes",
        "\n".join(_listed(rows, "wrong")) + "\n".join(_listed(rows, "crashes")) or "None.",
        "## Models with more sites rewritten than counted",
        "\n".join(_more(rows)) or "None.",
        "## Sites left alone, by reason",
        "\n".join(reasons(rows, attention=True)) or "None.",
        "## Softmaxes that are no attention",
        "\n".join(reasons(rows, attention=False)) or "None.",
        "## Models that could not be measured",
        "\n".join(_unmeasured(payload)) or "None.",
    ]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# Coverage

Made by `python benchmarks/coverage.py` from benchmarks/results/coverage.json ({device}; torch {torch}; commit
{commit}). One tiny model with random weights for every architecture of the installed transformers that builds by a
generic rule, and modules of torch.nn, x-transformers, diffusers, linear-attention-transformer and
flash-linear-attention."""

_EXPLANATION = """A mode is spelling of attention - attention_mask - dtype - training or not - sizes.

| column | meaning |
| --- | --- |
| softmaxes | over a tensor of at least three dimensions, and whole-attention calls, in one eager forward |
| sites | those with a contraction above and, below, one over the softmaxed dimension, on a functional ATen trace |
| rewritten | replaced by a kernel, or an SDPA call that is already the best there is |
| Inductor | what its own attention patterns replace in the same model |
| linear | linear-attention sites rewritten, of those reported |
| causal proven | masks proven causal, of the rewritten softmaxes without weight above the diagonal |
| unexplained | sites without a line in the report |
| wrong, crashes, graph breaks | models |
| reading | median seconds of reading, choosing and validating a model |

Neither count of sites asks attnopt."""


def reasons(rows: Rows, *, attention: bool) -> Iterator[str]:
    """Most frequent first, numbers in a reason left out; over all modes."""
    found: dict[str, Counter[str]] = {}
    lines: dict[str, str] = {}
    for row in rows:
        for verdict, _, reason, where, times in row.get("left", []):
            if (verdict != "rejected") is attention:
                key = re.sub(r"(?<=_)\d+|\b\d+\b", "N", reason)
                found.setdefault(key, Counter())[row["name"]] += times
                lines.setdefault(key, where)
    for key, models in sorted(found.items(), key=lambda item: -sum(item[1].values())):
        names = ", ".join(list(models)[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
        yield f"- {sum(models.values())} x {key} ({names}; such as `{lines[key]}`)"


def _listed(rows: Rows, what: str) -> Iterator[str]:
    for row in rows:
        for text in row.get(what, []):
            yield f"- {what}: {row['name']}, {row['mode']}: {text}"


def _unmeasured(payload: Mapping[str, Any]) -> Iterator[str]:
    for family, why in payload["left_out"].items():
        yield f"- {family}: {why}"
    seen = {(row["name"], row["error"]) for row in payload["rows"] if "error" in row}
    for name, why in sorted(seen):
        yield f"- {name}: {why[:160]}"


def plot(payload: Mapping[str, Any]) -> None:
    """Shares of the sites by family, attnopt beside Inductor, in the modes for which both were counted."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "attnopt"  # the same picture for the same figures
    from matplotlib import pyplot as plt

    shown = [
        f for f in figures(payload["rows"]) if f.inductor is not None and f.sites and f.family != "decoys"
    ]
    names = [
        f"{f.family}\n{'padded' if Mode.parse(f.mode).mask == 'left' else 'no mask'}\n{f.sites} sites"
        for f in shown
    ]
    figure, axes = plt.subplots(figsize=(max(6.0, 1.1 * len(shown)), 4.0), layout="constrained")
    for shift, label, color in ((-0.2, "attnopt", "#2a6f97"), (0.2, "Inductor", "#c9ada7")):
        shares = [100 * (f.share if label == "attnopt" else (f.inductor or 0) / f.sites) for f in shown]
        bars = axes.bar([n + shift for n in range(len(shown))], shares, 0.4, label=label, color=color)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(shown)), names, fontsize=8)
    axes.set_ylabel("sites replaced, %")
    axes.set_ylim(0, 110)
    axes.legend(frameon=False, ncols=2)
    figure.savefig(PLOT, metadata={"Date": None})
