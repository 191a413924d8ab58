"""The main job, on real input: rewrite SmolLM2-135M, prove that nothing changed, then stream it.

    make run        or        python examples/run.py [--tiny] [--tokens N] [--keep out.pt2]

1. Loads the model with its real weights (or the bundled tiny one, if they cannot be had) and exports it.
2. Rewrites it exactly, saves the program, loads it in a fresh process and compares: logits row by row against fp64,
   a greedy continuation, the perplexity of the opening of Austen's *Emma*, seconds.
3. Rewrites it approximately, as a stream of 4 attention sinks and the last 252 keys, and once without sinks.

Exits with 4 if a comparison fails.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import ModuleType

import smollm2
import tiny
import torch
from measuring import Answers, answers, exact_logits, perplexity, row_errors
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import attnopt
from attnopt.report import Report

HERE = Path(__file__).parent
PROMPT, COUNT = 32, 64
WORST = 2.0  # how many times the error of eager mode a row may be off
VERIFICATION_FAILED = 4
STREAMS = {
    "4 sinks + 252": {"softmax": "streaming", "sinks": 4, "window": 252},
    "window 256, no sinks": {"softmax": "streaming", "sinks": 0, "window": 256},
}

# torch's own, each time an exported program is copied
warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)

out, progress = Console(), Console(stderr=True)


@dataclass(frozen=True)
class Claim:
    """Something that must hold of the rewritten program, as it was found."""

    what: str
    original: str
    rewritten: str
    holds: bool | None  # None: a figure, not a claim


@contextmanager
def step(what: str) -> Iterator[None]:
    """Shows that something takes a while, and how long it took."""
    start = perf_counter()
    with progress.status(what):
        yield
    progress.print(f"  {what}: {perf_counter() - start:.1f} s", style="dim")


def load(*, small: bool) -> tuple[ModuleType, nn.Module]:
    """SmolLM2; or the tiny model, if it is asked for or if the weights or transformers are missing."""
    if small:
        return tiny, tiny.model()
    try:
        with step(f"loading {smollm2.NAME}"):
            return smollm2, smollm2.model()
    except smollm2.ModelUnavailableError as error:
        progress.print(
            f"{error}\nGoing on with {tiny.NAME}: its text and perplexity mean nothing.", style="yellow"
        )
        return tiny, tiny.model()


def export(model: nn.Module, ids: Tensor) -> ExportedProgram:
    """The model as a program for texts of 2 to 8,192 tokens."""
    with step("exporting"):
        return torch.export.export(model, (ids,), dynamic_shapes=({1: Dim("tokens", min=2, max=8_192)},))


def answers_in_a_fresh_process(program: ExportedProgram, ids: Tensor, file: Path) -> Answers:
    """Saves the program to `file`; what another process says that loads it."""
    with step(f"saving {file.name}"):
        torch.export.save(program, file)
    with tempfile.TemporaryDirectory() as folder:
        question, said = Path(folder, "question.pt"), Path(folder, "answers.pt")
        torch.save({"ids": ids, "prompt": PROMPT, "count": COUNT}, question)
        with step("loading it in a fresh process, and asking it"):
            subprocess.run([sys.executable, HERE / "reload.py", file, question, said], check=True)
        return Answers(**torch.load(said, weights_only=True))


def claims(eager: Answers, rewritten: Answers, exact: Tensor, ids: Tensor) -> list[Claim]:
    """The comparison, figure by figure."""
    was, now = row_errors(eager.logits, exact), row_errors(rewritten.logits, exact)
    before, after = perplexity(eager.logits, ids), perplexity(rewritten.logits, ids)
    same = eager.continuation == rewritten.continuation
    return [
        Claim(
            "worst row of the logits",
            f"{was.max():.1e}",
            f"{now.max():.1e}",
            bool(now.max() <= WORST * was.max()),
        ),
        Claim(
            "median row",
            f"{was.median():.1e}",
            f"{now.median():.1e}",
            bool(now.median() <= WORST * was.median()),
        ),
        Claim(f"greedy continuation, {COUNT} tokens", "", "the same" if same else "differs", same),
        Claim("perplexity", f"{before:.4f}", f"{after:.4f}", abs(after / before - 1) <= 1e-4),
        Claim(
            f"seconds, {ids.shape[1]:,} tokens",
            f"{eager.forward_seconds:.2f}",
            f"{rewritten.forward_seconds:.2f}",
            None,
        ),
        Claim(
            f"seconds, {COUNT} tokens one by one",
            f"{eager.continuation_seconds:.1f}",
            f"{rewritten.continuation_seconds:.1f}",
            None,
        ),
    ]


def all_rewritten(report: Report) -> Claim:
    """Whether each attention site was rewritten."""
    found, done = len(report.attention), len(report.having("rewritten"))
    return Claim("attention sites rewritten", f"{found}", f"{done}", 0 < found == done)


def comparison(found: list[Claim]) -> Table:
    """The claims as a table; errors of rows are relative, against fp64."""
    table = Table(
        "", "original", "rewritten", "", title="Exactly rewritten, saved, loaded in a fresh process"
    )
    for claim in found:
        verdict = {True: "[green]holds[/]", False: "[red]FAILS[/]", None: ""}[claim.holds]
        table.add_row(claim.what, claim.original, claim.rewritten, verdict)
    return table


@torch.inference_mode()
def streams(exported: ExportedProgram, eager: Answers, ids: Tensor) -> Table:
    """Perplexity and seconds of the model as a stream, beside full attention."""
    table = Table(
        "attention", "perplexity", "seconds", title=f"Streaming: {ids.shape[1]:,} tokens, at most 256 seen"
    )
    table.add_row("full", f"{perplexity(eager.logits, ids):.2f}", f"{eager.forward_seconds:.2f}")
    for name, options in STREAMS.items():
        with step(f"rewriting for {name}, and asking it"):
            program, _report = attnopt.rewrite(exported, options)
            model = program.module()
            start = perf_counter()
            logits = model(ids)[0]
        table.add_row(name, f"{perplexity(logits, ids):.2f}", f"{perf_counter() - start:.2f}")
    return table


def main(tokens: int, file: Path, *, small: bool) -> int:
    """Does it all; 0, or 4 if a claim does not hold."""
    source, model = load(small=small)
    ids = source.text_ids(tokens)
    exported = export(model, ids)
    with step("rewriting, each site checked in fp64"):
        program, report = attnopt.rewrite(exported)
    print(report)

    eager = answers(
        model,
        ids,
        prompt=PROMPT,
        count=COUNT,
        progress=lambda steps: track(steps, "  continuing", console=progress, transient=True),
    )
    rewritten = answers_in_a_fresh_process(program, ids, file)
    with step("the same in fp64, to compare with"):
        exact = exact_logits(model, ids)
    found = [all_rewritten(report), *claims(eager, rewritten, exact, ids)]
    out.print(comparison(found))
    prompt, continued = (
        source.decode(part) for part in (ids[0, :PROMPT], torch.tensor(rewritten.continuation))
    )
    out.print(Text.assemble((f"...{prompt[-160:]}", "dim"), (continued, "bold"), "\n"))
    out.print(streams(exported, eager, ids))
    return VERIFICATION_FAILED if any(claim.holds is False for claim in found) else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="use the bundled tiny model")
    parser.add_argument("--tokens", type=int, default=2_048, help="of the text (default: 2048)")
    parser.add_argument("--keep", type=Path, help="keep the rewritten program in this file")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(given.tokens, given.keep or Path(scratch, "rewritten.pt2"), small=given.tiny))
