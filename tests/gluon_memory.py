"""Tiles, memory and barriers of a GPU as numpy arrays and counters, for gluon_in_numpy."""

import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
#: Seconds: of waiting before it is for good, and of letting others go first.
PATIENCE, BREATH = 20.0, 2e-4


class Tile(np.ndarray):
    """A tile or a number, as kernels have them."""

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(shape=self.shape, layout=None)

    def to(self, dtype: object) -> "Tile":
        del dtype
        return self

    def __floordiv__(self, other: Any) -> "Tile":
        """Towards zero, as on a GPU."""
        return tile(np.trunc(np.asarray(self) / np.asarray(other)).astype(np.int64))

    def __mod__(self, other: Any) -> "Tile":
        return tile(np.fmod(np.asarray(self), np.asarray(other)))


def tile(x: object) -> Tile:
    """x as kernels see it."""
    return np.asarray(x).view(Tile)


@dataclass
class Memory:
    """Shared memory, or a view of it."""

    array: Array
    dtype: str = "float"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(shape=self.array.shape)

    def index(self, place: Any) -> Any:
        found = self.array[int(place)]
        return found[0] if found.dtype == object else Memory(found)

    def reshape(self, shape: list[int]) -> "Memory":
        view = self.array.view()
        view.shape = tuple(shape)
        return Memory(view)

    def permute(self, order: tuple[int, ...]) -> "Memory":
        return Memory(self.array.transpose(order))

    def store(self, x: Array) -> None:
        self.array[...] = x

    def load(self, layout: object) -> Tile:
        del layout
        return tile(self.array.copy())


@dataclass
class Barrier:
    """An mbarrier: a phase is over once all have arrived and all bytes are there."""

    count: int = 0
    missing: int = 0
    bytes: int = 0
    phase: int = 0
    changed: threading.Condition = field(default_factory=threading.Condition)

    def arrive(self, count: int = 0, coming: int = 0, come: int = 0) -> None:
        with self.changed:
            self.missing -= count
            self.bytes += coming - come
            assert self.missing >= 0, "more arrivals than a phase has"
            if self.missing == 0 and self.bytes == 0:
                self.missing, self.phase = self.count, self.phase + 1
                self.changed.notify_all()
        if not coming + come:
            time.sleep(BREATH)  # who waited goes on before whoever arrived reads what he should not

    def wait(self, parity: Any) -> None:
        with self.changed:
            over = self.changed.wait_for(lambda: self.phase & 1 != int(parity), timeout=PATIENCE)
            assert over, "waited for a phase that does not end"


@dataclass
class Pointer:
    """Global memory from an element on."""

    array: Array
    at: Any = 0

    def __add__(self, more: Any) -> "Pointer":
        return Pointer(self.array, self.at + more)


@dataclass
class Descriptor:
    """Blocks of an array that TMA moves; what lies outside is zero, and not written."""

    array: Array
    block_shape: list[int]
    dtype: str = "float"
    layout: object = None

    @property
    def block_type(self) -> SimpleNamespace:
        return SimpleNamespace(nbytes=4 * int(np.prod(self.block_shape)))

    def _inside(self, where: list[Any]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        starts = [int(x) for x in where]
        assert starts[-1] * 4 % 16 == 0, "the innermost coordinate lies at no 16 bytes"
        spans = list(zip(starts, self.block_shape, self.array.shape, strict=True))
        ours = [(max(at, 0), max(0, min(at + size, most))) for at, size, most in spans]
        there = tuple(slice(low, max(low, high)) for low, high in ours)
        return there, tuple(slice(x.start - at, x.stop - at) for x, at in zip(there, starts, strict=True))

    def read(self, where: list[Any]) -> Array:
        there, here = self._inside(where)
        block = np.zeros(self.block_shape, np.float32)
        block[here] = self.array[there]
        return block

    def write(self, where: list[Any], block: Array) -> None:
        there, here = self._inside(where)
        self.array[there] = block.reshape(self.block_shape)[here]
