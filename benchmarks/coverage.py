"""Coverage: what attnopt finds, rewrites and refuses in every architecture that builds, beside Inductor's own patterns.

    python benchmarks/coverage.py [--family F ...] [--mode M ...] [--only NAME ...] [--jobs N] [--full]
                                  [--out FILE] [--merge] [--publish]

Tiny models with random weights, eager inner compiler; each model in a process of its own with limits on time and
memory. Sites are counted without attnopt (coverage_count.py); outputs and, in training, the gradients of all parameters
are compared with eager, fp64 being the arbiter (coverage_compare.py). With no choice made the result goes to
results/coverage.json, docs/coverage.md, docs/coverage.svg and the README's table. Rows are kept in .cache as they come,
and a run that was interrupted goes on there if no source has changed. --publish only writes the pages anew. Exit status
1: a result is wrong, attnopt crashed, a decoy was rewritten, or a site was left alone without a reason.
"""

import argparse
import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import coverage_extra
import coverage_page
import coverage_report
import coverage_subjects
import coverage_zoo
import torch
from _record import RESULTS, write
from coverage_journal import Journal, Task
from coverage_measure import Row, measure
from coverage_modes import PLAIN, Mode, committed, every_mode

#: Of processor time for a mode; of waiting in addition; of memory.
SECONDS, PATIENCE, BYTES = 120, 300, 14 << 30
FAMILIES = (*coverage_zoo.FAMILIES, *coverage_extra.FAMILIES)


def tasks(families: Sequence[str], modes: Sequence[Mode], only: Sequence[str]) -> list[Task]:
    """What to measure. No modes: those of the committed result."""
    found = []
    for family in families:
        known = family in coverage_zoo.FAMILIES
        subjects = coverage_subjects.hugging_face(family) if known else coverage_extra.subjects(family)
        found += [
            Task(subject, tuple(modes) or committed(family, number))
            for number, subject in enumerate(subjects)
            if not only or any(name in subject.name for name in only)
        ]
    return found


def measure_all(todo: Sequence[Task], jobs: int) -> Iterator[dict[str, Any]]:
    """The rows, as they come."""
    waiting, running = list(todo), []
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_Worker.start(waiting.pop(0)))
        for worker in list(running):
            yield from worker.rows()
            if worker.is_over():
                running.remove(worker)
        time.sleep(0.02)


@dataclass(slots=True)
class _Worker:
    """A process that measures one task; what it had not sent when it died or ran out of time is an error row."""

    task: Task
    process: Any
    connection: Connection
    due: float
    done: int = 0
    ended: bool = False

    @classmethod
    def start(cls, task: Task) -> "_Worker":
        context = multiprocessing.get_context("fork")
        mine, its = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(task, its))
        process.start()
        its.close()
        return cls(task, process, mine, time.monotonic() + (PATIENCE + SECONDS) * len(task.modes))

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows that have arrived, and error rows for those that never will."""
        while not self.ended and self.connection.poll():
            try:
                row = self.connection.recv()
            except EOFError:
                self.ended = True
                break
            self.done += 1
            yield row
        if not self.ended and time.monotonic() > self.due:
            self.process.kill()
        if self.ended:
            self.process.join()
            yield from self._missing()

    def _missing(self) -> Iterator[dict[str, Any]]:
        subject, code = self.task.subject, self.process.exitcode
        for mode in self.task.modes[self.done :]:
            yield Row(
                subject.family, subject.name, str(mode), error=f"the process ended with {code}"
            ).to_dict()

    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.ended


def _work(task: Task, connection: Connection) -> None:
    """Runs in the child."""
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the life of the process
    signal.signal(signal.SIGPROF, _raise_timeout)
    for mode in task.modes:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of this process: the machine may be shared
        start = time.process_time()
        try:
            row = measure(task.subject, mode)
        except (OvertimeError, Exception) as problem:  # noqa: BLE001 - the row says what, the next mode goes on
            row = Row(
                task.subject.family,
                task.subject.name,
                str(mode),
                error=f"{type(problem).__name__}: {problem}",
            )
        signal.setitimer(signal.ITIMER_PROF, 0)
        row.seconds["row"] = round(time.process_time() - start, 2)
        connection.send(row.to_dict())


class OvertimeError(BaseException):
    """No Exception: nothing between here and the alarm may take it for a failure of its own."""


def _raise_timeout(*_: object) -> None:
    raise OvertimeError(f"over {SECONDS} s")


def main() -> int:
    """Measures, writes, prints the table last."""
    given = _parser().parse_args()
    path = Path(given.out) if given.out else RESULTS / "coverage.json"
    payload = json.loads(path.read_text()) if given.publish else measured(given, path)
    if given.publish or given.out or given.merge or not _is_choosy(given):
        if not given.publish:
            write("coverage", payload, path)
        if path.parent == RESULTS:
            coverage_page.publish(path)
    print(coverage_report.table(payload))
    print(coverage_page.readme(payload["rows"]))
    return coverage_report.status(payload)


def _is_choosy(given: argparse.Namespace) -> bool:
    """Whether only a part is measured: then nothing is written unless a file is named."""
    return bool(given.only or given.family or given.mode or given.full)


def measured(given: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What is asked for; of it, what an interrupted run has left is not measured again."""
    modes = every_mode() if given.full else [Mode.parse(text) for text in given.mode]
    quiet()
    journal = Journal.opened(f"{given.family} {given.mode} {given.only} {given.full}")
    todo = journal.missing(tasks(given.family or FAMILIES, modes, given.only))
    warm_up()
    for row in measure_all(todo, given.jobs):
        journal.add(row)
        print(coverage_report.line(row), flush=True)
    journal.path.unlink(missing_ok=True)
    rows = _joined(_earlier(path) if given.merge else [], journal.rows)
    work = sum(row.get("seconds", {}).get("row", 0.0) for row in rows)
    return {"seconds": round(work / given.jobs), "left_out": coverage_extra.left_out(), "rows": rows}


def _earlier(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _joined(earlier: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By model and mode, the later row counts."""
    found = {(row["family"], row["name"], row["mode"]): row for row in (*earlier, *rows)}
    return [found[key] for key in sorted(found)]


def quiet() -> None:
    """Libraries warn about tiny models; that says nothing here. To be called before transformers is imported."""
    coverage_extra.hide()
    import transformers

    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)


def warm_up() -> None:
    """One small measurement before the first fork: the compilers' own start is then shared, and in no figure."""
    measure(coverage_extra.warm(), PLAIN)
    torch._dynamo.reset()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", nargs="*", choices=FAMILIES, default=[])
    parser.add_argument(
        "--mode", nargs="*", default=[], help=f"such as {PLAIN} (none: those of the committed result)"
    )
    parser.add_argument("--only", nargs="*", default=[], help="parts of model names")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--full", action="store_true", help="every mode: hours")
    parser.add_argument("--out", help="where the JSON goes")
    parser.add_argument("--publish", action="store_true", help="measure nothing, write the pages anew")
    parser.add_argument(
        "--merge", action="store_true", help="keep the rows of the file that are not measured anew"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
