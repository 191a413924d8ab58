"""The page docs/coverage.md, and the table of the README, from the rows of the coverage benchmark."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _record import ROOT
from coverage_modes import Mode
from coverage_plot import plot
from coverage_report import Figures, Rows, done, figures, proven, sites_of, structural_counts, table

PAGE, README = ROOT / "docs" / "coverage.md", ROOT / "README.md"
_BEGIN, _END = "<!-- coverage: made by make coverage -->\n", "<!-- coverage ends -->"


def publish(path: Path) -> None:
    """Writes the page, the plot and the README's table from a result."""
    payload = json.loads(path.read_text())
    PAGE.write_text(page(payload))
    plot(payload)
    before, begin, rest = README.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if end:
        README.write_text(before + begin + readme(payload["rows"]) + end + after)


#: Rows of the README's table: what they are called, family, mode.
_SHOWN = (
    ("causal language models, eager attention", "causal", Mode()),
    ("the same, left-padded `attention_mask`", "causal", Mode(mask="left")),
    ("the same, training, gradients compared", "causal", Mode(training=True)),
    ("the same, `dynamic=True`", "causal", Mode(dynamic=True)),
    ("masked language models", "masked", Mode()),
    ("encoder and decoder", "seq2seq", Mode()),
    ("vision", "vision", Mode()),
    ("audio", "audio", Mode()),
)


def readme(rows: Rows) -> str:
    """The table of the README."""
    known = {(f.family, f.mode): f for f in figures(rows)}
    lines = ["| | models | sites | attnopt | Inductor's own patterns |", "|---|---|---|---|---|"]
    for label, family, mode in _SHOWN:
        if f := known.get((family, str(mode))):
            lines.append(
                f"| {label} | {f.models} | {f.sites} | {f.share:.1%} | {_peer(f)} |".replace("%", " %")
            )
    return "\n".join([*lines, ""])


def _peer(f: Figures) -> str:
    return "" if f.inductor is None else f"{f.inductor / max(f.sites, 1):.1%}"


def page(payload: Mapping[str, Any]) -> str:
    """docs/coverage.md."""
    rows, place = payload["rows"], payload["environment"]
    introduction = _INTRODUCTION.format(
        device=place["device"],
        **place["versions"],
        commit=str(place["commit"])[:10],
        minutes=payload["seconds"] // 60,
    )
    sections = {
        "Wrong results": _grouped(rows, "wrong"),
        "Crashes": _grouped(rows, "crashes"),
        "Graphs left untouched": _grouped(rows, "untouched"),
        "Rounding alone": _grouped([r for r in rows if _rounded(r)], "notes"),
        "Training, not proven in fp64": _grouped([r for r in rows if _unproven(r)], "notes"),
        "Causal masks left opaque": _opaque(rows),
        "Models with more sites rewritten than counted": _more(rows),
        "Sites left alone, by reason": reasons(rows, attention=True),
        "Softmaxes that are no attention": reasons(rows, attention=False),
        "Models that could not be measured": _unmeasured(payload),
    }
    parts = [
        introduction,
        "![Sites found by attnopt and by Inductor](coverage.svg)",
        table(payload),
        _EXPLANATION,
    ]
    for title, lines in sections.items():
        parts += [f"## {title}", *([_WHY[title]] if title in _WHY else []), "\n".join(lines) or "None."]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# Coverage

Made by `make coverage` from benchmarks/results/coverage.json ({device}; torch {torch}; commit {commit}; {minutes}
minutes). One tiny model with random weights for every architecture of the installed transformers that builds by a
generic rule, and modules of torch.nn, x-transformers, diffusers, linear-attention-transformer and
flash-linear-attention."""

_EXPLANATION = """A mode is spelling of attention - attention_mask - dtype - training or not - sizes. In modes with few
models every fourth one was run.

| column | meaning |
| --- | --- |
| softmaxes | over a tensor of at least three dimensions, and whole-attention calls, in one eager forward |
| sites | those with a contraction above and, below, one over the softmaxed dimension, on a functional ATen trace |
| rewritten | replaced by a kernel, or an SDPA call that is already the best there is |
| Inductor | what its own attention patterns replace in the same model |
| linear | linear-attention sites rewritten, of those in the kernel's family (+ reported ones of other recurrences) |
| causal proven | masks with a proven causal part, of the rewritten softmaxes without weight above the diagonal |
| unexplained | sites without a line in the report, in models without graph breaks and untouched graphs |
| wrong, crashes, untouched, graph breaks | models |
| reading | median seconds of reading, choosing and validating a model |

Neither count of sites asks attnopt.

An output or gradient is compared with the same model in fp64 throughout, in its worst and its median row: at most four
times eager's error, or the rounding of the dtype at the size of the largest row. What exceeds this is wrong unless the
rewritten program, run in fp64, equals eager's in fp64 (up to four times what eight runs of eager in
fp64 with redrawn roundings do to that number), and its error is at most four times the worst of eight such runs of
eager in its dtype. Those are listed under "Rounding alone"."""

_WHY: Mapping[str, str] = {
    "Crashes": "An exception inside attnopt, or in the compiled model where Dynamo alone succeeds.",
    "Graphs left untouched": "By decision, with the reason; their sites count as not rewritten.",
    "Rounding alone": "Further from fp64 than one run of eager; the rewritten program is proven equal in fp64.",
    "Training, not proven in fp64": "Compared in their own dtype only, and right there; why there is no proof.",
    "Causal masks left opaque": "Rewritten softmaxes without weight above the diagonal whose mask was read as a "
    "tensor; and those proven causal that have a tensor beside it.",
}


def _rounded(row: Mapping[str, Any]) -> bool:
    return any(note.startswith("rounding alone") for note in row.get("notes", []))


def _unproven(row: Mapping[str, Any]) -> bool:
    return Mode.parse(row["mode"]).training and not row.get("proven")


def _grouped(rows: Rows, what: str) -> Iterator[str]:
    """One line for each text, with the models and modes that gave it."""
    found: dict[str, _Group] = {}
    for row in rows:
        for text in row.get(what, []):
            found.setdefault(text.removeprefix("rounding alone: "), _Group()).add(row)
    for text, group in sorted(found.items(), key=lambda item: -len(item[1].models)):
        yield f"- {text} ({group})"


@dataclass(slots=True)
class _Group:
    """Rows that say the same."""

    models: dict[str, int] = field(default_factory=dict)
    modes: dict[str, None] = field(default_factory=dict)

    def add(self, row: Mapping[str, Any], times: int = 1) -> None:
        """One more row."""
        self.models[row["name"]] = self.models.get(row["name"], 0) + times
        self.modes[row["mode"]] = None

    def __str__(self) -> str:
        return f"{_some(list(self.models), 8)}; {_some(list(self.modes), 3)}"


def _some(names: Sequence[str], count: int) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _opaque(rows: Rows) -> Iterator[str]:
    structural = structural_counts(rows)
    found: dict[str, _Group] = {}
    for row in rows:
        causal, known = proven(row, sites_of(row, structural))
        for spec in row.get("specs", {}):
            unread = causal > known and "causal" not in spec and ("bias" in spec or "opaque" in spec)
            if unread or ("causal" in spec and "opaque" in spec):
                found.setdefault(_told(spec, broken=bool(row.get("breaks")) and unread), _Group()).add(row)
    for text, group in sorted(found.items(), key=lambda item: -len(item[1].models)):
        yield f"- {text} ({group})"


def _told(spec: str, *, broken: bool) -> str:
    if "causal" in spec:
        return "proven causal, and a tensor of data beside it"
    why = "; Dynamo broke the graph, and the mask may come from another part" if broken else ""
    return f"read as {' '.join(re.sub(r'scale=[^ ]+ ?', '', spec).split()[1:])}{why}"


def _more(rows: Rows) -> Iterator[str]:
    """Models in which more was rewritten than is attention by structure: a decoy, or a softmax written by hand."""
    structural = structural_counts(rows)
    for row in rows:
        known = structural.get((row["name"], Mode.parse(row["mode"]).attention))
        if known is not None and not row.get("breaks") and done(row) > known:
            yield f"- {row['name']}, {row['mode']}: {done(row)} rewritten, {known} sites by structure"


def reasons(rows: Rows, *, attention: bool) -> Iterator[str]:
    """Most frequent first, numbers in a reason left out; over all modes."""
    found: dict[str, _Group] = {}
    lines: dict[str, str] = {}
    for row in rows:
        for verdict, _, reason, where, times in row.get("left", []):
            if (verdict != "rejected") is attention:
                key = re.sub(r"(?<=_)\d+|\b\d+\b", "N", reason)
                found.setdefault(key, _Group()).add(row, times)
                lines.setdefault(key, where)
    for key, group in sorted(found.items(), key=lambda item: -sum(item[1].models.values())):
        yield f"- {sum(group.models.values())} x {key} ({group}; such as `{lines[key]}`)"


def _unmeasured(payload: Mapping[str, Any]) -> Iterator[str]:
    for family, why in payload["left_out"].items():
        yield f"- {family}: {why}"
    found: dict[str, _Group] = {}
    for row in payload["rows"]:
        if "error" in row:
            found.setdefault(row["error"][:160], _Group()).add(row)
    for why, group in sorted(found.items(), key=lambda item: list(item[1].models)):
        yield f"- {group}: {why}"
