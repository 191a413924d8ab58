"""Options: one frozen dataclass, the source of the `options=` dict, the ATTNOPT_* variables and the CLI flags."""

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from attnopt.errors import OptionError

Softmax = Literal["exact", "streaming", "sparq"]
Verify = Literal["compile", "off", "first", "sample", "always"]
Inner = Literal["inductor", "aot_eager", "eager"]
Value = str | int | bool | tuple[str, ...]

PREFIX = "ATTNOPT_"
#: The variable that names a file of options.
FILE = "ATTNOPT_OPTIONS"
_TRUTH = {
    "1": True,
    "true": True,
    "yes": True,
    "on": True,
    "0": False,
    "false": False,
    "no": False,
    "off": False,
}


def _option(default: Value, doc: str, *, choices: object = None, least: int | None = None) -> Any:
    """A dataclass field with its documentation and what it may hold."""
    return field(default=default, metadata={"doc": doc, "choices": get_args(choices), "least": least})


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user may choose. Checked on construction; `Options.parse` reads mappings and the environment."""

    softmax: Softmax = _option(
        "exact",
        "What may replace softmax attention; streaming and sparq are approximations and happen only when named.",
        choices=Softmax,
    )
    sinks: int = _option(4, "Streaming: how many of the first keys each query keeps.", least=0)
    window: int = _option(
        1024, "Streaming: how many of the last keys each query sees, itself included.", least=1
    )
    rank: int = _option(32, "SparQ: components of the query that score the keys (r in the paper).", least=1)
    topk: int = _option(128, "SparQ: keys whose values are fetched (k in the paper).", least=1)
    local: int = _option(
        32, "SparQ: most recent keys, always fetched (l in the paper); part of topk.", least=0
    )
    verify: Verify = _option(
        "compile",
        "When a site is checked: while compiling (against fp64), never, or also on real data "
        "(first call, a sample of calls, each call).",
        choices=Verify,
    )
    inner: Inner = _option("inductor", "Who compiles the rest of the graph.", choices=Inner)
    strict: bool = _option(default=False, doc="Raise an error when an attention-shaped site is left alone.")
    allow: tuple[str, ...] = _option((), "Kernels that may be used, by name; none named: all of them.")
    deny: tuple[str, ...] = _option((), "Kernels that may not be used, by name.")
    assume_causal: bool = _option(
        default=False, doc="Take a mask that cannot be proven as causal, on your word; the report says so."
    )

    def __post_init__(self) -> None:
        for spot in fields(self):
            _check(spot, getattr(self, spot.name), spot.name)
        if self.local > self.topk:
            raise OptionError(f"option local={self.local}: wanted at most topk, which is {self.topk}")
        both = sorted({*self.allow} & {*self.deny})
        if both:
            raise OptionError(
                f"options allow and deny both name {', '.join(both)}: name a kernel in one of them"
            )

    @classmethod
    def parse(
        cls, given: "Mapping[str, object] | Options | None" = None, environ: Mapping[str, str] = os.environ
    ) -> "Options":
        """Defaults, then the file that ATTNOPT_OPTIONS names, then the other ATTNOPT_* variables, then `given`.

        An Options object is complete and returned as it is.
        Raises OptionError for an unknown name (with the nearest one) and for a value that the option cannot have.
        """
        if isinstance(given, Options):
            return given
        if given is not None and not isinstance(given, Mapping):
            raise OptionError(f"options are a {type(given).__name__}; wanted a dict, an Options or None")
        named = environ.get(FILE)
        read = read_options(Path(named)) if named else {}
        values: dict[str, Any] = {**read, **_from_environment(environ), **_from_mapping(given or {})}
        return cls(**values)

    def to_dict(self) -> dict[str, Value]:
        """The options by name, in order; `Options.parse` reads it back."""
        return asdict(self)

    def changed(self) -> dict[str, Value]:
        """Only the options that differ from their default."""
        return {
            spot.name: value for spot in fields(self) if (value := getattr(self, spot.name)) != spot.default
        }


def read_options(path: Path) -> dict[str, object]:
    """The options in a JSON file: an object of them, or one that has them under "options", as `attnopt tune` writes.

    Raises OptionError for a file that cannot be read or holds something else.
    """
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"the options in {path} cannot be read: {error}") from error
    found = held.get("options", held) if isinstance(held, dict) else held
    if not isinstance(found, dict):
        raise OptionError(f"{path} holds a {type(found).__name__}; wanted a JSON object of options")
    return _from_mapping(found)


def option_fields() -> tuple[Field[Any], ...]:
    """The options as dataclass fields; `metadata` holds doc, choices (or ()) and least (or None)."""
    return fields(Options)


def _from_environment(environ: Mapping[str, str]) -> dict[str, object]:
    """Options set as ATTNOPT_NAME; an empty variable counts as not set."""
    _refuse_misspelt(environ)
    named = {PREFIX + spot.name.upper(): spot for spot in option_fields()}
    given = {variable: environ[variable] for variable in named if environ.get(variable)}
    return {
        named[variable].name: _decode(named[variable], text, variable) for variable, text in given.items()
    }


def _refuse_misspelt(environ: Mapping[str, str]) -> None:
    """Other ATTNOPT_* variables may exist; one that all but names an option is a slip of the pen."""
    known = [PREFIX + spot.name.upper() for spot in option_fields()]
    for variable in environ:
        near = difflib.get_close_matches(variable, known, n=1, cutoff=0.85)
        if variable.startswith(PREFIX) and near and variable not in (*known, FILE):
            raise OptionError(f"unknown variable {variable}; did you mean {near[0]}?")


def _from_mapping(given: Mapping[str, object]) -> dict[str, object]:
    spots = {spot.name: spot for spot in option_fields()}
    for name in given:
        if name not in spots:
            raise OptionError(_unknown(str(name), spots))
    return {name: _listed(spots[name], value) for name, value in given.items()}


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown option {name!r}{hint} (one of: {', '.join(known)})"


def _listed(spot: Field[Any], value: object) -> object:
    """Kernel names may come as a list, a set or one string with commas."""
    if not isinstance(spot.default, tuple):
        return value
    if isinstance(value, str):
        return _split(value)
    return tuple(sorted(value)) if isinstance(value, set | frozenset) else _tupled(value)


def _tupled(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _decode(spot: Field[Any], text: str, variable: str) -> object:
    """The value that the text of a variable stands for; checked here, so that the message names the variable."""
    value: object = text.strip()
    if isinstance(spot.default, tuple):
        value = _split(text)
    elif isinstance(spot.default, bool):
        value = _TRUTH.get(text.strip().lower(), text)
    elif isinstance(spot.default, int) and text.strip().removeprefix("-").isdecimal():
        value = int(text)
    _check(spot, value, variable)
    return value


def _check(spot: Field[Any], value: object, called: str) -> None:
    """Raises OptionError unless `value` is one that the option can have."""
    wanted = _wanted(spot)
    least: int | None = spot.metadata["least"]
    choices: tuple[str, ...] = spot.metadata["choices"]
    match spot.default:
        case bool():
            fine = isinstance(value, bool)
        case int():
            fine = (
                isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)
            )
        case tuple():
            fine = isinstance(value, tuple) and all(isinstance(name, str) and name for name in value)
        case _:
            fine = isinstance(value, str) and value in choices
    if not fine:
        raise OptionError(f"{'option ' * (called == spot.name)}{called}={value!r}: wanted {wanted}")


def _wanted(spot: Field[Any]) -> str:
    match spot.default:
        case bool():
            return "true or false"
        case int():
            return f"a whole number of at least {spot.metadata['least']}"
        case tuple():
            return "names of kernels"
    return f"one of {', '.join(spot.metadata['choices'])}"
