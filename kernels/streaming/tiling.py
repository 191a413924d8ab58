"""How the torch path cuts its work: tiles of scores that are small enough for the cache, and touch what is seen."""

from collections.abc import Iterator
from dataclasses import dataclass

from attnopt.kernels.streaming.reach import Reach, Span

#: Scores in one tile: few enough that the passes of the softmax find them in the cache; on a GPU enough to fill it.
TILE = 1 << 20
GPU_TILE = 1 << 24


@dataclass(frozen=True, slots=True)
class Tile:
    """Some batch items x kv heads x queries, and the key columns that these queries see."""

    batch: slice
    heads: slice
    rows: Span
    sections: tuple[Span, ...]

    @property
    def queries(self) -> tuple[slice, slice, slice, slice]:
        """Index into (B, Hkv, G, Sq, ...)."""
        return (self.batch, self.heads, slice(None), slice(*self.rows))

    @property
    def columns(self) -> list[tuple[slice, slice]]:
        """For each section: where it lies among the keys, and where in the tile."""
        widths = [stop - start for start, stop in self.sections]
        starts = [sum(widths[:n]) for n in range(len(widths))]
        return [
            (slice(*section), slice(start, start + width))
            for section, start, width in zip(self.sections, starts, widths, strict=True)
        ]


def tiles(batch: int, heads: int, group: int, reach: Reach, most: int) -> Iterator[Tile]:
    """Blocks of queries, each with as many kv heads, then batch items, as fit into one tile of `most` scores.

    group: query heads to a kv head. Queries that see no key at all are in no tile.
    """
    block = _block(reach, group, batch * heads * group, most)
    for first in range(0, reach.rows, block):
        span = (first, min(first + block, reach.rows))
        sections = tuple(reach.sections(span))
        fit = most // max(1, group * block * sum(stop - start for start, stop in sections))
        for b in _steps(batch if sections else 0, max(1, fit // max(1, heads))):
            for h in _steps(heads, max(1, min(heads, fit))):
                yield Tile(b, h, span, sections)


def _block(reach: Reach, group: int, heads: int, most: int) -> int:
    """Queries in one block. Long ones touch more hidden pairs, short ones take more steps; with many heads in a step
    (`heads`, over the whole batch) steps cost less. Measured by benchmarks/streaming_cpu.py.
    """
    seen = reach.columns
    if reach.windowed:
        seen = min(seen, reach.upper - reach.lower + reach.head)
    return max(16, min(128 if heads < 32 or not reach.windowed else 64, most // max(1, group * seen)))


def _steps(size: int, step: int) -> Iterator[slice]:
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))
