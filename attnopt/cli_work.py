"""What the commands do, apart from flags: rewrite and check and save, time, list."""

import inspect
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from attnopt import cli_bench, cli_compare, cli_evaluate, cli_sources, files
from attnopt.cli_compare import OutputCheck
from attnopt.cli_flags import Output
from attnopt.cli_sources import Source
from attnopt.errors import Blame, OptionError, OutputError, SourceError, VerificationError
from attnopt.options import Options
from attnopt.programs import explain as explain_model
from attnopt.programs import rewrite as rewrite_program
from attnopt.registry import kernels, rules
from attnopt.report import Report
from attnopt.report_text import totals


@dataclass(frozen=True, slots=True)
class Target:
    """The files that `attnopt rewrite` writes: the program, and its report beside it."""

    program: Path
    force: bool = False

    @property
    def report(self) -> Path:
        """`out.pt2.report.json` for `out.pt2`."""
        return self.program.with_name(f"{self.program.name}.report.json")

    def check(self, inputs: tuple[Path, ...] = ()) -> None:
        """Raises OutputError when one of the files may not be written; called before the long work."""
        if self.program.suffix != ".pt2":
            raise OutputError(
                f"will not write {self.program}: the name of an exported program must end in .pt2"
            )
        for path in (self.program, self.report):
            files.check_writable(path, force=self.force, inputs=inputs)

    def write(self, program: ExportedProgram, report: Report, inputs: tuple[Path, ...]) -> None:
        """Both files or none."""
        write = partial(files.atomic, force=self.force, inputs=inputs)
        with write(self.report) as side, write(self.program) as main:
            side.write(report.to_json().encode())
            files.save_program(program, main)


@dataclass(frozen=True, slots=True)
class Rewritten:
    """What became of one model, and how its outputs compare; no checks without example inputs."""

    report: Report
    checks: tuple[OutputCheck, ...]
    target: Target | None

    def __str__(self) -> str:
        outputs = (
            cli_compare.table(self.checks)
            if self.checks
            else "outputs not compared: there are no example inputs"
        )
        written = f"wrote {self.target.program} and {self.target.report}" if self.target else ""
        return "\n\n".join(part for part in (str(self.report), outputs, written) if part)

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "file": str(self.target.program) if self.target else None,
            "outputs": list(cli_compare.as_dicts(self.checks)),
            "report": json.loads(self.report.to_json()),
        }


def target(out: Path | None, *, dry_run: bool, force: bool) -> Target | None:
    """Where to write, or None on a dry run. Raises OptionError without a name, OutputError for one that cannot be."""
    if dry_run:
        return None
    if out is None:
        raise OptionError("where to? Say -o OUT.pt2, or --dry-run")
    chosen = Target(out, force)
    chosen.check()
    return chosen


def load(text: str, inputs: list[str] | None, output: Output, *, allow_unsafe: bool) -> Source:
    """SOURCE, with its notes told."""
    with output.step(f"loading {text}"):
        loaded = cli_sources.load(text, inputs or (), allow_unsafe=allow_unsafe)
    for note in loaded.notes:
        output.note(f"note: {note}")
    return loaded


def rewrite(
    program: ExportedProgram,
    source: Source,
    to: Target | None,
    options: Options,
    output: Output,
    *,
    require_match: bool,
    text: tuple[str, Path] | None = None,
) -> Rewritten:
    """Rewrites, compares on the example inputs, writes. Raises VerificationError before anything is written.

    require_match: write nothing when no site was rewritten. text: SOURCE as it was written, and a text on which to
    measure what the rewrite costs.
    """
    if to:
        to.check(source.files)
    with output.step("rewriting"):
        rewritten, report = rewrite_program(program, options)
    checks: tuple[OutputCheck, ...] = ()
    if source.has_inputs:
        exact = all(site.exact for site in report.having("rewritten"))
        with (
            output.step("running both on the example inputs"),
            Blame("running the programs on the example inputs"),
        ):
            checks = cli_compare.compare(program, rewritten, source.args, source.kwargs, exact=exact)
    _need_agreement(checks)
    if text:
        with output.step(f"running both on {text[1]}"):
            found = cli_evaluate.evaluate(text[1], text[0], source, program, rewritten)
        report = replace(report, evaluation=found.as_dict())
    if require_match and not report.having("rewritten"):
        return Rewritten(report, checks, None)
    if to:
        with output.step(f"writing {to.program}"):
            to.write(rewritten, report, source.files)
    return Rewritten(report, checks, to)


def explain(source: Source, name: str, options: Options) -> Report:
    """What would become of the model: by its graph breaks and graphs, or directly for an exported program."""
    if isinstance(source.model, ExportedProgram):
        return rewrite_program(source.model, options)[1]
    with Blame(f"running {name} on its example inputs", "-v shows the traceback"):
        return explain_model(source.model, *source.args, options=options, **source.kwargs)


@dataclass(frozen=True, slots=True)
class Bench:
    """Timings side by side, and what was rewritten."""

    timings: tuple[cli_bench.Timing, ...]
    report: Report

    def __str__(self) -> str:
        return f"{cli_bench.table(self.timings)}\n\n{totals(self.report)}"

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "timings": [each.as_dict() for each in self.timings],
            "report": json.loads(self.report.to_json()),
        }


def bench(source: Source, plan: cli_bench.Plan, options: Options, output: Output, *, compiled: bool) -> Bench:
    """Times the model as it is, rewritten, and on request both under torch.compile."""
    if not source.has_inputs:
        raise SourceError("there are no example inputs to run on; say --input SHAPE:DTYPE")
    with output.step("exporting and rewriting"):
        program = source.exported()
        rewritten, report = rewrite_program(program, options)
    variants = {"original": program.module(), "attnopt": rewritten.module()}
    if compiled:
        variants |= _compiled(source, options)
    runs = {name: partial(model, *source.args, **source.kwargs) for name, model in variants.items()}
    with torch.no_grad(), output.step(f"timing {', '.join(runs)}"):
        timings = cli_bench.measure(runs, plan)
    return Bench(timings, report)


def known() -> dict[str, list[dict[str, object]]]:
    """The rules and the kernels, for JSON."""
    return {
        "rules": [
            {"name": rule.name, "reads": _first_line(rule), "anchors": sorted(map(str, rule.anchors))}
            for rule in rules()
        ],
        "kernels": [
            {
                "name": k.name,
                "family": k.family,
                "exact": k.exact,
                "serves": _first_line(k),
                "honours": sorted(k.reads),
            }
            for k in kernels()
        ],
    }


def listing(found: Mapping[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The rules and the kernels, as lines."""
    yield "rules"
    for rule in found["rules"]:
        yield from (f"  {rule['name']}: {rule['reads']}", f"      at {', '.join(rule['anchors'])}")
    yield from ("", "kernels")
    for kernel in found["kernels"]:
        exact = "exact" if kernel["exact"] else "approximate"
        yield f"  {kernel['name']} ({kernel['family']}, {exact}): {kernel['serves']}"
        yield f"      honours {', '.join(kernel['honours'])}"


def _need_agreement(checks: tuple[OutputCheck, ...]) -> None:
    wrong = cli_compare.failed(checks)
    if wrong:
        names = ", ".join(check.name for check in wrong)
        raise VerificationError(
            f"outputs differ more than rounding explains: {names}; nothing was written. Please report it\n"
            + cli_compare.table(checks)
        )


def _compiled(source: Source, options: Options) -> dict[str, Any]:
    inner, settings = options.inner, dict[str, Any](options.to_dict())
    return {
        f"{inner} alone": torch.compile(source.runnable(), backend=inner),
        f"attnopt + {inner}": torch.compile(source.runnable(), backend="attnopt", options=settings),
    }


def _first_line(thing: object) -> str:
    """The first line of the docstring of an object's class, or of the module that defines it."""
    text = inspect.getdoc(type(thing)) or inspect.getdoc(inspect.getmodule(type(thing))) or ""
    return text.partition("\n")[0]
