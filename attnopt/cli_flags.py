"""What all commands share: the flags made from Options, where output goes, and how errors become exit codes."""

import inspect
import json
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import Field, dataclass
from functools import wraps
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Annotated, Any, Literal

import typer

from attnopt import errors
from attnopt.options import PREFIX, Options, option_fields, read_options

Command = Callable[..., None]

#: Exit code by kind of error; the first class that fits counts. 1 is left for bugs.
EXIT_CODES: Mapping[type[BaseException], int] = MappingProxyType(
    {
        errors.StrictError: 3,
        errors.VerificationError: 4,
        errors.UnsafeFileError: 5,
        errors.MissingError: 6,
        errors.UnsupportedError: 6,
        errors.AttnoptError: 2,
    }
)
INTERNAL, NO_MATCH = 1, 3

#: Exceptions by which typer itself ends a command.
_ENDINGS = (typer.Exit, typer.Abort, typer.BadParameter)


@dataclass(frozen=True, slots=True)
class Output:
    """Data goes to stdout, as JSON or as text; progress and remarks go to stderr, unless `quiet`."""

    as_json: bool = False
    quiet: bool = False
    verbose: bool = False

    def data(self, text: str, body: object) -> None:
        """The result of the command: `body` as JSON under --json, else `text`."""
        typer.echo(json.dumps(body, indent=2) if self.as_json else _coloured(text))

    def note(self, text: str) -> None:
        """A remark."""
        if not self.quiet:
            typer.echo(text, err=True)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announces a piece of work that may take long, and says how long it took."""
        start = time.perf_counter()
        if not self.quiet:
            typer.echo(f"{name} ...", err=True, nl=False)
        try:
            yield
        finally:
            self.note(f" {time.perf_counter() - start:.1f} s")


class Reported:
    """A block in which every exception becomes a message on stderr and an exit code."""

    def __init__(self, output: Output) -> None:
        self.output = output

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, Exception) or isinstance(error, _ENDINGS):
            return
        if self.output.verbose:
            typer.echo("".join(traceback.format_exception(error)), err=True)
        typer.echo(_message(error), err=True)
        raise typer.Exit(exit_code(error)) from error


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends in `error`."""
    return next((code for kind, code in EXIT_CODES.items() if isinstance(error, kind)), INTERNAL)


def _message(error: Exception) -> str:
    if isinstance(error, errors.AttnoptError):
        return f"error: {error}"
    return f"internal error: {type(error).__name__}: {error} (a bug; -v shows where, please report it)"


def command(function: Command) -> Command:
    """A command with the flags --json, -q and -v; `function` gets them as `output`, and its errors are reported."""
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "output"]

    @wraps(function)
    def run(*, as_json: bool, quiet: bool, verbose: bool, **given: Any) -> None:
        output = Output(as_json, quiet, verbose)
        with Reported(output), warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            function(**given, output=output)

    return _with_parameters(run, [*own, *_OUTPUT_FLAGS])


def optioned(function: Command) -> Command:
    """A command with one flag for each of attnopt's options, and --options FILE; `function` gets them checked.

    A flag that is not given leaves the choice to the file, then to the ATTNOPT_* variable, or to the default.
    """
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "options"]
    names = [spot.name for spot in option_fields()]

    @wraps(function)
    def run(**given: Any) -> None:
        path = given.pop("options_file")
        chosen = {name: value for name in names if (value := given.pop(name)) not in (None, [])}
        function(**given, options=Options.parse({**(read_options(path) if path else {}), **chosen}))

    return _with_parameters(run, [*own, _options_file(), *map(_option_flag, option_fields())])


def _with_parameters(function: Command, parameters: list[inspect.Parameter]) -> Command:
    """Tells typer which parameters the function has."""
    keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
    function.__signature__ = inspect.Signature(keyword)  # type: ignore[attr-defined]
    function.__annotations__ = {p.name: p.annotation for p in keyword}
    return function


def _options_file() -> inspect.Parameter:
    flag = typer.Option(
        "--options",
        help="A JSON file of options, such as `attnopt tune` writes; other flags go before it.",
        rich_help_panel="attnopt's options",
        metavar="FILE",
    )
    return _parameter("options_file", Annotated[Path | None, flag], None)


def _option_flag(spot: Field[Any]) -> inspect.Parameter:
    choices = spot.metadata["choices"]
    kind: Any = {bool: bool, int: int, tuple: list[str], str: Literal[choices]}[type(spot.default)]
    metavar = {bool: None, int: "N", tuple: "KERNEL", str: "|".join(choices)}[type(spot.default)]
    default = "none" if spot.default == () else str(spot.default).lower()
    text = f"{spot.metadata['doc']} (default: {default}; variable: {PREFIX}{spot.name.upper()})"
    flag = typer.Option(
        help=text, rich_help_panel="attnopt's options", min=spot.metadata["least"], metavar=metavar
    )
    return _parameter(spot.name, Annotated[kind | None, flag], None)


def _parameter(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_OUTPUT_FLAGS = (
    _parameter(
        "as_json", Annotated[bool, typer.Option("--json", help="Results as JSON on stdout.")], default=False
    ),
    _parameter(
        "quiet", Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")], default=False
    ),
    _parameter(
        "verbose",
        Annotated[bool, typer.Option("--verbose", "-v", help="Warnings, and tracebacks of errors.")],
        default=False,
    ),
)


def _coloured(text: str) -> str:
    """Verdicts in colour on a terminal; plain text elsewhere and under NO_COLOR."""
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if not console.is_terminal or console.no_color:
        return text
    marked = Text(text)
    for style, words in (
        ("green", "rewritten|ok"),
        ("yellow", "refused|warning"),
        ("red", "quarantined|missing|differs"),
    ):
        marked.highlight_regex(rf"(?m)(?<![\w-])({words})(?![\w-])", style)
    with console.capture() as shown:
        console.print(marked, soft_wrap=True, end="")
    return shown.get()


def columns() -> int:
    """The width for tables: the terminal's, up to where lines become hard to follow; 100 where there is none."""
    return min(shutil.get_terminal_size((100, 24)).columns, 160)


def is_terminal() -> bool:
    """Whether a person is likely to read stderr as it comes."""
    return sys.stderr.isatty()
