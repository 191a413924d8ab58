"""What is to be measured, and the rows of a run as they come: one that was interrupted goes on where it was."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _record import ROOT
from coverage_modes import Mode
from coverage_subjects import Subject


@dataclass(frozen=True, slots=True)
class Task:
    """A subject, and the modes in which it is measured."""

    subject: Subject
    modes: tuple[Mode, ...]


@dataclass(slots=True)
class Journal:
    """The rows of a run as they come, in a file named after the sources and what was asked for."""

    path: Path
    rows: list[dict[str, Any]]

    @classmethod
    def opened(cls, asked: str) -> "Journal":
        """With the rows that an interrupted run has left."""
        folders = ("attnopt", "passes", "kernels", "benchmarks")
        sources = sorted(path for name in folders for path in (ROOT / name).rglob("*.py"))
        digest = hashlib.sha256(asked.encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()
        path = ROOT / ".cache" / f"coverage-{digest[:16]}.jsonl"
        path.parent.mkdir(exist_ok=True)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a killed process may have left half a line
        path.write_text(whole)
        return cls(path, [json.loads(line) for line in whole.splitlines()])

    def add(self, row: dict[str, Any]) -> None:
        """Notes a row, at once."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def missing(self, todo: Sequence[Task]) -> list[Task]:
        """What has no row yet."""
        known = {(row["family"], row["name"], row["mode"]) for row in self.rows}
        left = [
            Task(task.subject, tuple(m for m in task.modes if (*_key(task.subject), str(m)) not in known))
            for task in todo
        ]
        return [task for task in left if task.modes]


def _key(subject: Subject) -> tuple[str, str]:
    return subject.family, subject.name
