"""Which keys a query reaches, as two diagonals and a head of columns: the arithmetic that lets blocks be skipped."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: A range of key columns or query rows: start included, stop not.
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Reach:
    """Query i sees key j when (j <= i + upper and (j > i + lower or j < sinks)) or j < prefix.

    0 <= i < rows, 0 <= j < columns. Every structured mask of this kernel has this one form: no causality is an
    `upper` beyond the last column, no window a `lower` before the first. All numbers are clamped to the sizes.
    """

    rows: int
    columns: int
    upper: int
    lower: int
    sinks: int
    prefix: int

    @property
    def causal(self) -> bool:
        """Whether some query misses a key that comes after it."""
        return self.upper < self.columns - 1

    @property
    def windowed(self) -> bool:
        """Whether some query misses a key because it is too old."""
        return self.rows - 1 + self.lower >= self.sinks

    @property
    def head(self) -> int:
        """Columns at the start that queries far behind still see."""
        return max(self.prefix, self.sinks if self.windowed else 0)

    def sections(self, rows: Span) -> list[Span]:
        """The key columns that some query of `rows` sees, as at most two spans that do not touch."""
        first, last = rows
        head = max(self.prefix, min(self.sinks, last + self.upper), 0)
        start, stop = max(first + self.lower + 1, head), min(last + self.upper, self.columns)
        if start <= head:
            return [span for span in ((0, max(head, stop)),) if span[1] > 0]
        return [span for span in ((0, head), (start, stop)) if span[1] > span[0]]

    def edges(self, rows: Span, section: Span) -> list[Span]:
        """The parts of `section` where some query of `rows` sees the key and another does not."""
        first, last = rows
        head = (0, max(self.prefix, min(self.sinks, first + self.upper + 1)))
        core = (last + self.lower, first + self.upper + 1)
        return [left for part in _without(section, head) for left in _without(part, core)]

    def tile(self, rows: Span, columns: Span, device: torch.device) -> Tensor:
        """bool (rows, columns): the definition, for one tile."""
        i = torch.arange(*rows, device=device)[:, None]
        j = torch.arange(*columns, device=device)[None, :]
        recent = (j > i + self.lower) | (j < self.sinks)
        return ((j <= i + self.upper) & recent) | (j < self.prefix)

    def pairs(self, block: int = 1) -> int:
        """How many (query, key) pairs blocks of `block` queries touch; with block 1, how many are visible."""
        return sum(self._touched((i, min(i + block, self.rows))) for i in range(0, self.rows, block))

    def may_leave_a_row_empty(self) -> bool:
        """Whether the structure alone can hide every key from some query."""
        return self.prefix == 0 and (self.upper < 0 or (self.sinks == 0 and self._window_misses()))

    def _window_misses(self) -> bool:
        return self.upper <= self.lower or self.rows + self.lower >= self.columns

    def _touched(self, rows: Span) -> int:
        return (rows[1] - rows[0]) * sum(stop - start for start, stop in self.sections(rows))


def reach(
    *, offset: int | None, window: int | None, sinks: int, prefix: int, rows: int, columns: int
) -> Reach:
    """The Reach of a structured mask: causal up to j <= i + offset, the last `window` keys or the first `sinks`.

    offset None: not causal, and then there is no window either. Numbers may have any size and sign.
    """
    upper = columns if offset is None else offset
    lower = -rows if offset is None or window is None else offset - window
    return Reach(
        rows=rows,
        columns=columns,
        upper=_clamp(upper, -rows, columns),
        lower=_clamp(lower, -rows, columns),
        sinks=_clamp(sinks, 0, columns),
        prefix=_clamp(prefix, 0, columns),
    )


def _clamp(x: int, least: int, most: int) -> int:
    return max(least, min(x, most))


def _without(span: Span, hole: Span) -> Iterator[Span]:
    """What is left of `span` when `hole` is cut out."""
    start, stop = max(span[0], hole[0]), min(span[1], hole[1])
    if start >= stop:
        yield span
        return
    for left in ((span[0], start), (stop, span[1])):
        if left[1] > left[0]:
            yield left
