"""Runs many mutants in several processes and counts: `python tests/hunt.py --programs 60000`; fails if one is wrong.

A file (JSON) keeps the counts of each run, with its commit. A wrong mutant is printed and written there at once, with
the seed that makes it again. `--seconds N` ends the run after that time, with what has run until then.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Self

HERE = Path(__file__).parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path[:0] = [str(HERE), str(HERE.parent)]

#: Seeds that one process takes at a time; shares after which it makes room for a new one; seconds of work on one seed.
SHARE, SHARES, PATIENCE = 50, 200, 120
#: Seconds between two writings of the file.
PAUSE = 60


@dataclass
class Counts:
    """totals: by what happened. operators: "operator verdict" -> mutants. drawn: "operator outcome" -> draws."""

    totals: Counter[str] = field(default_factory=Counter)
    operators: Counter[str] = field(default_factory=Counter)
    drawn: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    unsettled: list[str] = field(default_factory=list)

    def __iadd__(self, other: "Counts") -> Self:
        self.totals += other.totals
        self.operators += other.operators
        self.drawn += other.drawn
        self.wrong += other.wrong
        self.unsettled += other.unsettled
        return self


def say(text: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def hunt(start: int, names: tuple[str, ...], end: float) -> Counts:
    """The trials of one share of the seeds; those not begun at `end`, by the clock of the machine, are left out."""
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, _too_long)
    counts = Counts()
    for seed in range(start, start + SHARE):
        if time.time() >= end:
            break
        signal.setitimer(signal.ITIMER_PROF, PATIENCE)  # of its own, however busy the machine is
        try:
            _count(counts, seed, names)
        except TimeoutError:
            counts.totals["wrong"] += 1
            counts.wrong.append(f"seed {seed}: not done after {PATIENCE} s")
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    return counts


def _too_long(*_: Any) -> None:
    raise TimeoutError


def _count(counts: Counts, seed: int, names: tuple[str, ...]) -> None:
    from mutant_trials import trial

    found = trial(seed, names)
    counts.drawn += found.drawn
    if found.differs is None:
        counts.totals["no program"] += 1
        return
    line = f"seed {seed}: {found.name} {found.operators} {found.setting} {found.verdicts}: "
    verdict = _verdict(found)
    counts.operators += Counter({f"{name} {verdict}": 1 for name in set(found.operators)})
    counts.totals[verdict] += 1
    if verdict == "wrong":
        counts.wrong.append(line + found.wrong)
    if verdict == "unsettled":
        counts.unsettled.append(line + found.unsettled)
        return  # it shows nothing, and counts as nothing
    counts.totals["programs"] += 1
    counts.totals["programs that differ"] += found.differs
    sizes = "free" if found.setting.free else "fixed"
    counts.totals[f"{sizes} sizes, {'training' if found.setting.training else 'inference'}"] += 1


def _verdict(found: Any) -> str:
    if found.wrong or found.unsettled:
        return "wrong" if found.wrong else "unsettled"
    said = {verdict.split()[-1] for verdict in found.verdicts}
    known = ("rewritten", "kept", "refused", "rejected", "quarantined")
    return next((each for each in known if each in said), "nothing found")


def main() -> int:
    """Hunts until so many programs have run, or for so long. The exit status is 1 if one was wrong."""
    options = _parse()
    counts, start, written = Counts(), time.perf_counter(), time.perf_counter()
    for found in _shares(options):
        before = counts.totals["programs"] // 5000
        counts += found
        for line in found.wrong:
            say(f"WRONG {line}")
        if counts.totals["programs"] // 5000 > before:
            say(f"{counts.totals['programs']} programs, {counts.totals['wrong']} wrong")
        if options.out and (found.wrong or time.perf_counter() - written > PAUSE):
            _write(Path(options.out), _told(counts, time.perf_counter() - start, options))
            written = time.perf_counter()
        if counts.totals["programs"] >= options.programs:
            break
    told = _told(counts, time.perf_counter() - start, options)
    if options.out:
        _write(Path(options.out), told)
    say(json.dumps({name: value for name, value in told.items() if name != "unsettled mutants"}, indent=1))
    say(f"{told['programs']} programs ran in {told['seconds']} s, {told['wrong']} wrong")
    return int(counts.totals["wrong"] > 0)


def _shares(options: argparse.Namespace) -> Iterator[Counts]:
    """The counts of one share after another, as they come, from as many processes as were asked for."""
    starts, end = count(options.seed, SHARE), time.time() + options.seconds
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=spawn, max_tasks_per_child=SHARES) as pool:
        running: set[Future[Counts]] = set()
        try:
            while True:
                while len(running) <= options.workers and time.time() < end:
                    running.add(pool.submit(hunt, next(starts), tuple(options.only), end))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (each.result() for each in done)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _told(counts: Counts, seconds: float, options: argparse.Namespace) -> dict[str, Any]:
    totals = counts.totals
    return {
        "commit": options.commit, "programs": totals["programs"], "wrong": totals["wrong"], "seed": options.seed,
        "differ from the original": totals["programs that differ"], "seconds": round(seconds),
        "programs a second": round(totals["programs"] / seconds, 1),
        "totals": dict(sorted(totals.items())),
        "operators": _by_operator(counts.operators), "draws": _by_operator(counts.drawn),
        "wrong mutants": counts.wrong, "unsettled mutants": counts.unsettled,
    }  # fmt: skip


def _by_operator(counted: Counter[str]) -> dict[str, dict[str, int]]:
    table: dict[str, dict[str, int]] = {}
    for key, number in sorted(counted.items()):
        name, _, kind = key.partition(" ")
        table.setdefault(name, {})[kind] = number
    return table


def _write(path: Path, told: dict[str, Any]) -> None:
    """Adds the run to those in the file; the same run, seen by commit and first seed, is replaced."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    others = [run for run in runs if (run["commit"], run["seed"]) != (told["commit"], told["seed"])]
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps({"runs": [*others, told]}, indent=1) + "\n")
    whole.replace(path)  # so that it can be read at any time


def _commit() -> str:
    """The commit that is checked out, with a plus sign if files were changed since."""
    git = shutil.which("git")
    if git is None:
        return "unknown"
    asked = [git, "-C", str(HERE.parent), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=60_000, help="stop when so many mutants have run")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time, too")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--only", nargs="*", default=[], help="names of programs; none: all")
    parser.add_argument("--out", default="", help="a file for the counts")
    return parser.parse_args(namespace=argparse.Namespace(commit=_commit()))


if __name__ == "__main__":
    sys.exit(main())
