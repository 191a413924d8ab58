"""Runs many mutants in several processes and counts: `python tests/hunt.py --programs 60000`; fails if one is wrong.

A result file (JSON) holds the counts; every wrong mutant is printed with the seed that makes it again.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

#: Seeds that one process takes at a time.
SHARE = 50


def say(text: str) -> None:
    """One line, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def hunt(task: tuple[int, tuple[str, ...]]) -> tuple[Counter[str], list[str]]:
    """The trials of one share of the seeds: counts, and a line for each wrong one."""
    import torch
    from mutant_trials import trial

    torch.set_num_threads(1)
    start, names = task
    counts: Counter[str] = Counter()
    wrong = []
    for seed in range(start, start + SHARE):
        found = trial(seed, names)
        counts += Counter({f"drawn: {key}": n for key, n in found.drawn.items()})
        if found.differs is None:
            counts["no program"] += 1
            continue
        counts["programs"] += 1
        counts["programs that differ"] += found.differs
        verdicts = sorted(set(found.verdicts)) or ["nothing found"]
        counts += Counter({f"with: {verdict}": 1 for verdict in verdicts})
        sizes = "free" if found.setting.free else "fixed"
        counts[f"mode: {sizes} sizes, {'training' if found.setting.training else 'inference'}"] += 1
        if found.wrong:
            counts["wrong"] += 1
            wrong.append(
                f"seed {seed}: {found.name} {found.operators} {found.setting} {found.verdicts}: {found.wrong}"
            )
    return counts, wrong


def main() -> int:
    """Hunts until so many programs have run. The exit status is 1 if one was wrong."""
    options = _parse()
    counts: Counter[str] = Counter()
    start, lines = time.perf_counter(), []
    tasks = ((options.seed + n * SHARE, tuple(options.only)) for n in range(10**9))
    with multiprocessing.get_context("spawn").Pool(options.workers, maxtasksperchild=100) as pool:
        for found, wrong in pool.imap_unordered(hunt, _limited(tasks, options, counts)):
            counts += found
            lines += wrong
            for line in wrong:
                say(line)
            if counts["programs"] // 5000 > (counts["programs"] - found["programs"]) // 5000:
                say(f"{counts['programs']} programs, {counts['wrong']} wrong")
            if counts["programs"] >= options.programs:
                break
        pool.terminate()
    seconds = time.perf_counter() - start
    _finish(counts, lines, seconds, options)
    return int(counts["wrong"] > 0)


def _limited(tasks: Any, options: argparse.Namespace, counts: Counter[str]) -> Any:
    """Tasks while programs are wanted; the pool asks for them ahead of time."""
    for ahead, task in enumerate(tasks):
        while ahead * SHARE > counts["programs"] + counts["no program"] + 4 * options.workers * SHARE:
            time.sleep(0.05)
        if counts["programs"] >= options.programs:
            return
        yield task


def _finish(counts: Counter[str], lines: list[str], seconds: float, options: argparse.Namespace) -> None:
    shown = {
        "programs": counts["programs"], "differ from the original": counts["programs that differ"],
        "wrong": counts["wrong"], "programs a second": round(counts["programs"] / seconds, 1),
        "seconds": round(seconds), "seed": options.seed,
    }  # fmt: skip
    say("\n".join(f"{name:28} {n}" for name, n in shown.items()))
    for key in sorted(counts):
        if key.startswith(("with", "mode")):
            say(f"{key:44} {counts[key]}")
    for name in sorted({key.split()[1] for key in counts if key.startswith("drawn")}):
        kinds = {kind: counts[f"drawn: {name} {kind}"] for kind in ("differs", "same", "broken", "no place")}
        placed = sum(kinds.values()) - kinds["no place"]
        say(f"{name:28} {kinds['differs'] / max(placed, 1):4.0%} of {placed} differ {kinds}")
    if options.out:
        Path(options.out).write_text(
            json.dumps({**shown, "counts": dict(sorted(counts.items())), "wrong mutants": lines}, indent=1)
            + "\n"
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=60_000, help="stop when so many mutants have run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--only", nargs="*", default=[], help="names of programs; none: all")
    parser.add_argument("--out", default="", help="a file for the counts")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
