"""The command line: rewrite, explain, bench, tune, report, rules, doctor.

Data on stdout, progress on stderr. Exit codes: 0 done, 1 internal error, 2 usage, 3 nothing matched under
--require-match (or a site left alone under --strict), 4 verification failed, 5 unsafe file refused, 6 missing package
or device. What is heavy is imported where it is used, so that --help stays quick.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from attnopt.cli_flags import NO_MATCH, Output, columns, command, optioned
from attnopt.errors import MissingError, SourceError
from attnopt.options import Options
from attnopt.report import Report
from attnopt.report_text import render

app = typer.Typer(
    name="attnopt",
    help="Finds attention in PyTorch models, proves what it computes and replaces it by fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SourceText = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="file.py:factory or package.module:factory (both are run; the factory returns model, (model, args) or "
        "(model, args, kwargs)), a Hugging Face folder or config.json, or a .pt2.",
    ),
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        "--input", metavar="SPEC", help="A random input, in place of the factory's: 1x128:int64<1000."
    ),
]
Dynamic = Annotated[
    list[str] | None,
    typer.Option(metavar="INPUT:AXIS=NAME[:MIN..MAX]", help="An axis of any length: 0:1=tokens:2..4096."),
]
Unsafe = Annotated[
    bool,
    typer.Option(
        "--allow-unsafe-load", help="Load a .pt2 without inspecting it: it may run code that is inside it."
    ),
]
RequireMatch = Annotated[bool, typer.Option("--require-match", help="Exit with 3 when no site is rewritten.")]
Force = Annotated[bool, typer.Option("--force", help="Replace existing files; never the input.")]


def _print_versions(wanted: bool) -> None:  # noqa: FBT001 - typer calls it with the flag's value
    if not wanted:
        return
    from attnopt.versions import versions

    typer.echo(", ".join(f"{name} {value}" for name, value in versions().items()))
    raise typer.Exit


@app.callback()
def attnopt(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print versions.", is_eager=True, callback=_print_versions)
    ] = False,
) -> None:
    """Finds attention in PyTorch models, proves what it computes and replaces it by fused kernels."""
    del version


@app.command()
@command
@optioned
def rewrite(
    source: SourceText,
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The .pt2 to write, with its report beside it.")
    ] = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    force: Force = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Do everything but write.")] = False,
    require_match: RequireMatch = False,
    evaluate: Annotated[
        Path | None,
        typer.Option(metavar="TEXT", help="A text on which to measure perplexity before and after."),
    ] = None,
    allow_unsafe_load: Unsafe = False,
    output: Output,
    options: Options,
) -> None:
    """Rewrite a model, compare it on its example inputs, and save it as a .pt2 with its report."""
    from attnopt import cli_inputs, cli_work

    target = cli_work.target(out, dry_run=dry_run, force=force)
    axes = [cli_inputs.parse_dynamic(text) for text in dynamic or ()]
    loaded = cli_work.load(source, inputs, output, allow_unsafe=allow_unsafe_load)
    with output.step("exporting"):
        program = loaded.exported(axes)
    text = (source, evaluate) if evaluate else None
    done = cli_work.rewrite(program, loaded, target, options, output, require_match=require_match, text=text)
    output.data(str(done), done.as_dict())
    _need_match(done.report, required=require_match)


@app.command()
@command
@optioned
def explain(
    source: SourceText,
    *,
    inputs: Inputs = None,
    require_match: RequireMatch = False,
    allow_unsafe_load: Unsafe = False,
    output: Output,
    options: Options,
) -> None:
    """Show what would become of each attention in a model, and why; nothing is changed."""
    from attnopt import cli_work

    loaded = cli_work.load(source, inputs, output, allow_unsafe=allow_unsafe_load)
    with output.step("explaining"):
        found = cli_work.explain(loaded, source, options)
    output.data(render(found, columns()), json.loads(found.to_json()))
    _need_match(found, required=require_match)


@app.command()
@command
@optioned
def bench(
    source: SourceText,
    *,
    inputs: Inputs = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also under torch.compile, with --inner.")
    ] = False,
    calls: Annotated[int, typer.Option(min=1, help="Calls to measure, at most.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Calls before that.")] = 3,
    budget: Annotated[float, typer.Option(min=0, help="Seconds to measure, at most.")] = 30.0,
    allow_unsafe_load: Unsafe = False,
    output: Output,
    options: Options,
) -> None:
    """Time a model on its example inputs, as it is and rewritten."""
    from attnopt import cli_bench, cli_work

    loaded = cli_work.load(source, inputs, output, allow_unsafe=allow_unsafe_load)
    plan = cli_bench.Plan(warmup, calls, budget)
    found = cli_work.bench(loaded, plan, options, output, compiled=compiled)
    output.data(str(found), found.as_dict())


@app.command()
@command
def tune(
    source: SourceText,
    *,
    text: Annotated[Path, typer.Option(metavar="FILE", help="A text, or a .json file with token ids.")],
    max_ppl_increase: Annotated[str, typer.Option(metavar="SHARE", help="What the choice may cost.")] = "1%",
    tokens: Annotated[int, typer.Option(min=4, help="Tokens of the text, at most.")] = 2048,
    prompt: Annotated[int | None, typer.Option(min=1, help="Tokens before decoding (default: half).")] = None,
    rank: Annotated[list[int] | None, typer.Option(min=1, help="A rank to try (default: four).")] = None,
    topk: Annotated[list[int] | None, typer.Option(min=1, help="A topk to try (default: three).")] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|FILE:FUNCTION", help="The tokenizer (default: what lies beside SOURCE)."
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The JSON to write, for --options and ATTNOPT_OPTIONS.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="OUT", help="An SVG to draw.")] = None,
    force: Force = False,
    output: Output,
) -> None:
    """Choose SparQ's rank and topk for a language model by the perplexity that they cost on a text."""
    from attnopt import cli_tune_work

    asked = cli_tune_work.Asked(source, text, tokens, tokenizer, device, out, plot, force)
    found = cli_tune_work.run(asked, max_ppl_increase, prompt, rank or (), topk or (), output)
    output.data(str(found), found.as_dict())
    if found.chosen is None:
        raise typer.Exit(NO_MATCH)


@app.command()
@command
def report(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A report as JSON, or a .pt2 with its report beside it.")
    ],
    *,
    html: Annotated[Path | None, typer.Option(metavar="OUT", help="Write it as one HTML page.")] = None,
    force: Force = False,
    output: Output,
) -> None:
    """Print a saved report as a table, or turn it into a page."""
    from attnopt import files

    path = file.with_name(f"{file.name}.report.json") if file.suffix == ".pt2" else file
    try:
        loaded = Report.from_json(path.read_bytes())
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error
    if html:
        page = loaded.to_html()
        with files.atomic(html, force=force, inputs=[path]) as stream:
            stream.write(page.encode())
        output.note(f"wrote {html}")
    output.data(render(loaded, columns()), json.loads(loaded.to_json()))


@app.command()
@command
def rules(*, output: Output) -> None:
    """List the rules that read attention and the kernels that serve it."""
    from attnopt import cli_work

    found = cli_work.known()
    output.data("\n".join(cli_work.listing(found)), found)


@app.command()
@command
def doctor(*, output: Output) -> None:
    """Check that everything attnopt needs is there, and that it works on a toy; exit with 6 if not."""
    from attnopt import cli_doctor

    with output.step("examining"):
        findings = list(cli_doctor.examine())
    output.data(cli_doctor.table(findings), {"findings": [finding.as_dict() for finding in findings]})
    lacking = cli_doctor.missing(findings)
    if lacking:
        raise MissingError(", ".join(finding.name for finding in lacking))


def main() -> None:
    """The console script."""
    app()


def _need_match(found: Report, *, required: bool) -> None:
    if required and not found.having("rewritten"):
        typer.echo("error: no site was rewritten (--require-match)", err=True)
        raise typer.Exit(NO_MATCH)
