"""The grid of `attnopt tune` as one SVG: what each setting costs over what it reads."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from attnopt.cli_tune import Setting, Tuned
from attnopt.errors import MissingError

TEMPLATE = Path(__file__).parent / "tune.svg.jinja"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 640, 400, 70, 150, 30, 50
_COLOURS = ("#2a6f97", "#bc6c25", "#588157", "#7b2cbf", "#c9184a", "#6c757d")


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in the drawing, with its text."""

    x: float
    y: float
    text: str
    colour: str = ""


@dataclass(frozen=True, slots=True)
class Axes:
    """From traffic (powers of two) and the increase of perplexity, as a share, to pixels."""

    least: float
    low: float
    high: float

    @staticmethod
    def of(tuned: Tuned) -> "Axes":
        """Wide enough for all settings, dense attention and the limit."""
        increases = [0.0, tuned.limit, *(s.increase for s in tuned.settings)]
        margin = 0.05 * (max(increases) - min(increases)) or 0.01
        least = min((s.traffic for s in tuned.settings), default=0.5)
        return Axes(
            2.0 ** math.floor(math.log2(min(least, 0.5))), min(increases) - margin, max(increases) + margin
        )

    def x(self, traffic: float) -> float:
        """Pixels from the left."""
        part = 1 - math.log2(max(traffic, self.least)) / math.log2(self.least)
        return round(_LEFT + part * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, increase: float) -> float:
        """Pixels from the top."""
        part = (self.high - increase) / (self.high - self.low)
        return round(_TOP + part * (_HEIGHT - _TOP - _BOTTOM), 1)

    def columns(self) -> Iterator[Mark]:
        """A line for each power of two."""
        for power in range(round(-math.log2(self.least)) + 1):
            yield Mark(self.x(2.0**-power), _HEIGHT - _BOTTOM, f"1/{2**power}" if power else "1")

    def rows(self) -> Iterator[Mark]:
        """Lines at round shares."""
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        step *= next(
            factor for factor in (0.1, 0.2, 0.5, 1.0, 2.0) if (self.high - self.low) / (factor * step) < 8
        )
        for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1):
            yield Mark(_LEFT, self.y(n * step), f"{100 * n * step:+.3g} %")


def render(tuned: Tuned) -> str:
    """The drawing. Raises MissingError when jinja2 is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise MissingError("the plot needs jinja2; pip install 'attnopt[report]'") from error
    axes = Axes.of(tuned)
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        width=_WIDTH, height=_HEIGHT, left=_LEFT, top=_TOP, right=_WIDTH - _RIGHT, bottom=_HEIGHT - _BOTTOM,
        columns=list(axes.columns()), rows=list(axes.rows()), limit=axes.y(tuned.limit), curves=_curves(tuned, axes),
        chosen=_mark(tuned.chosen, axes) if tuned.chosen else None,
    )  # fmt: skip


def _curves(tuned: Tuned, axes: Axes) -> list[tuple[str, str, Sequence[Mark]]]:
    """For each rank its name, its colour and its settings from little traffic to much."""
    ranks = sorted({setting.rank for setting in tuned.settings})
    ordered = sorted(tuned.settings, key=lambda setting: setting.traffic)
    return [
        (f"rank {rank}", _COLOURS[n % len(_COLOURS)], [_mark(s, axes) for s in ordered if s.rank == rank])
        for n, rank in enumerate(ranks)
    ]


def _mark(setting: Setting, axes: Axes) -> Mark:
    said = f"rank {setting.rank}, topk {setting.topk}: traffic {setting.traffic:.3f}, {setting.increase:+.2%}"
    return Mark(axes.x(setting.traffic), axes.y(setting.increase), said)
