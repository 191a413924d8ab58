"""The report as JSON and back. The text is data of unknown origin: every field is checked, nothing is trusted."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from functools import partial
from types import MappingProxyType
from typing import Any, get_args

from attnopt.errors import ReportError
from attnopt.report import SCHEMA, Family, GraphReport, Report, SiteReport, Verdict

Reader = Callable[[object], Any]

#: JSON has no NaN and no infinities: they travel as these strings.
_SPECIAL = MappingProxyType({"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf})


def encode(report: Report) -> str:
    """`report` as JSON text: two spaces of indent, fields in a fixed order, no NaN."""
    body = {"schema": SCHEMA, **_plain_fields(report)}
    return json.dumps(body, indent=2, allow_nan=False)


def decode(text: str | bytes) -> Report:
    """The report in `text`. Raises ReportError for malformed JSON, another schema, or a field of the wrong kind."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"not the JSON of a report: {error}") from error
    if not isinstance(body, dict) or "schema" not in body:
        raise ReportError("not a report: wanted a JSON object with the key 'schema'")
    if body["schema"] != SCHEMA:
        raise ReportError(f"report schema {body['schema']!r}; this version of attnopt reads schema {SCHEMA}")
    report: Report = _build(Report, _REPORT, body, "report")
    return report


def _plain(value: object) -> object:
    """`value` in JSON's terms; what JSON cannot say becomes text."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else _name_of(value)
        case SiteReport() | GraphReport():
            return _plain_fields(value)
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case _:
            return str(value)


def _plain_fields(data: Report | SiteReport | GraphReport) -> dict[str, object]:
    return {spot.name: _plain(getattr(data, spot.name)) for spot in fields(data)}


def _name_of(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _build(kind: type, readers: Mapping[str, Reader], data: object, where: str) -> Any:
    """An instance of the dataclass `kind`; keys it does not know are ignored, as later versions may add some."""
    if not isinstance(data, dict):
        raise ReportError(f"{where} is {_kind(data)}; wanted an object")
    spots: Iterable[Field[Any]] = fields(kind)
    present = [spot for spot in spots if spot.name in data or _required(spot, where)]
    return kind(
        **{spot.name: _read(readers[spot.name], data[spot.name], f"{where}.{spot.name}") for spot in present}
    )


def _required(spot: Field[Any], where: str) -> bool:
    if spot.default is MISSING and spot.default_factory is MISSING:
        raise ReportError(f"{where} lacks the key {spot.name!r}")
    return False


def _read(reader: Reader, value: object, where: str) -> Any:
    try:
        return reader(value)
    except _WrongKindError as wrong:
        raise ReportError(f"{where}{wrong.at} is {_kind(wrong.value)}; wanted {wrong.wanted}") from wrong


class _WrongKindError(Exception):
    def __init__(self, value: object, wanted: str, at: str = "") -> None:
        super().__init__(wanted)
        self.value, self.wanted, self.at = value, wanted, at


def _kind(value: object) -> str:
    """What a JSON value is, for a message; long values are cut."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise _WrongKindError(value, "a string")
    return value


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise _WrongKindError(value, "true or false")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _WrongKindError(value, "a whole number of at least 0")
    return value


def _number(value: object) -> float:
    if isinstance(value, str) and value in _SPECIAL:
        return _SPECIAL[value]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _WrongKindError(value, "a number, 'NaN', 'Infinity' or '-Infinity'")
    try:
        return float(value)
    except OverflowError as error:
        raise _WrongKindError(value, "a number that fits in 64 bits") from error


def _optional(reader: Reader, value: object) -> Any:
    return None if value is None else reader(value)


def _one_of(choices: tuple[str, ...], value: object) -> str:
    if value not in choices:
        raise _WrongKindError(value, f"one of {', '.join(choices)}")
    return str(value)


def _tuple_of(reader: Reader, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _WrongKindError(value, "a list")
    return tuple(_at(reader, item, f"[{index}]") for index, item in enumerate(value))


def _mapping_of(reader: Reader, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _WrongKindError(value, "an object")
    return {name: _at(reader, item, f".{name}") for name, item in value.items()}


def _at(reader: Reader, value: object, at: str) -> Any:
    try:
        return reader(value)
    except _WrongKindError as wrong:
        raise _WrongKindError(wrong.value, wrong.wanted, at + wrong.at) from wrong


def _option(value: object) -> object:
    """A value of Options: text, a number, a truth or a list of names."""
    if isinstance(value, list):
        return _tuple_of(_text, value)
    if not isinstance(value, str | int | bool):
        raise _WrongKindError(value, "text, a whole number, a truth or a list of names")
    return value


def _fact(value: object) -> object:
    """Text or a number."""
    return _text(value) if isinstance(value, str) and value not in _SPECIAL else _number(value)


def _site(value: object) -> SiteReport:
    site: SiteReport = _build(SiteReport, _SITE, value, "site")
    return site


def _graph(value: object) -> GraphReport:
    graph: GraphReport = _build(GraphReport, _GRAPH, value, "graph")
    return graph


_AMOUNT = partial(_optional, _number)
_SITE: Mapping[str, Reader] = MappingProxyType(
    {
        "family": partial(_one_of, get_args(Family)),
        "verdict": partial(_one_of, get_args(Verdict)),
        **dict.fromkeys(("spec", "where", "module", "reason", "node", "code", "advice"), _text),
        **dict.fromkeys(("kernel", "nearest_rule"), partial(_optional, _text)),
        "exact": _truth,
        **dict.fromkeys(("error", "approximation_error"), _AMOUNT),
        **dict.fromkeys(("bytes_before", "bytes_after", "flops_before", "flops_after"), _AMOUNT),
        "origin": _count,
    }
)
_GRAPH: Mapping[str, Reader] = MappingProxyType(
    {"nodes_before": _count, "nodes_after": _count, "seconds": partial(_mapping_of, _number)}
)
_REPORT: Mapping[str, Reader] = MappingProxyType(
    {
        "sites": partial(_tuple_of, _site),
        "graphs": partial(_tuple_of, _graph),
        "graph_breaks": partial(_tuple_of, _text),
        "options": partial(_mapping_of, _option),
        "versions": partial(_mapping_of, _text),
        "seconds": partial(_mapping_of, _number),
        "warnings": partial(_tuple_of, _text),
        "evaluation": partial(_mapping_of, _fact),
    }
)
