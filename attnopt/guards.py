"""Run-time checks behind what was proven from the values of buffers: a graph whose buffers changed is not rewritten.

A buffer is the same as long as it is the same memory at the same version; in-place operations of torch raise a tensor's
version, and another tensor has another address. Only when that changes is the buffer looked at again, and then all
that counts is whether it still has the form that was proven: a module moved to another device, or another layer that
runs the same compiled code, passes. Writes that torch does not count (through `.data`, or by foreign code that shares
the memory) are not seen; torch.compile's own treatment of constants has the same limit.
"""

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, UntypedStorage
from torch.fx import GraphModule

from attnopt.buffers import Buffer, buffers_read, note_on, write_note
from attnopt.passes.mask_literals import Form, form_of

#: So many tensors are remembered for each buffer: layers that share compiled code.
REMEMBERED = 256


@dataclass(slots=True)
class Guard:
    """One buffer that was proven to have a form.

    place: of the graph's arguments. known: what was found to have the form: address -> version, layout and memory; the
    memory is kept so that no other tensor can get the same address.
    """

    place: int
    form: Form | None
    known: dict[int, tuple[tuple[Any, ...], UntypedStorage]] = field(default_factory=dict)

    def holds(self, args: Sequence[Any]) -> bool:
        """Whether the argument has the form."""
        given = args[self.place]
        if not isinstance(given, Tensor) or given.is_inference():
            return False
        seen = self.known.get(given.data_ptr())
        if seen is not None and seen[0] == _state(given):
            return True
        if self.form is None or form_of(given) != self.form:
            return False
        self._remember(given)
        return True

    def _remember(self, given: Tensor) -> None:
        if len(self.known) >= REMEMBERED:
            self.known.clear()
        self.known[given.data_ptr()] = (_state(given), given.untyped_storage())


def _state(given: Tensor) -> tuple[Any, ...]:
    return given._version, given.dtype, given.shape, given.stride()


class Holds(Protocol):
    """A check of some arguments of a graph."""

    def holds(self, args: Sequence[Any]) -> bool:
        """Whether they are what the graph was compiled for."""


@dataclass(slots=True)
class Guarded:
    """A compiled graph that stands on the form of some buffers.

    original: a copy of the graph before, which stands on none.
    """

    compiled: Callable[..., Any]
    original: GraphModule
    guards: Sequence[Holds]
    warned: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, *args: Any) -> Any:
        """The graph's outputs: the compiled ones, or the original's where a buffer has another form now."""
        if all(guard.holds(args) for guard in self.guards):
            return self.compiled(*args)
        self._warn()
        return self.original(*args)

    def _warn(self) -> None:
        with self.lock:
            first, self.warned = not self.warned, True
        if first:
            warnings.warn(
                "a mask or a decay that a module holds in a buffer has changed since it was compiled; the original "
                "graph answers, uncompiled. Call torch._dynamo.reset() to compile it anew",
                RuntimeWarning,
                stacklevel=4,
            )


@dataclass(frozen=True, slots=True)
class Note:
    """The argument at `place` carries the note `proven`: the compiled graph that made it has proven that of it."""

    place: int
    proven: object

    def holds(self, args: Sequence[Any]) -> bool:
        """Whether it does, and was not written to since."""
        return note_on(args[self.place]) == self.proven


@dataclass(frozen=True, slots=True)
class Noting:
    """A compiled graph that notes on some of its results what is proven of them. proven: place -> the note."""

    compiled: Callable[..., Any]
    proven: Mapping[int, object]

    def __call__(self, *args: Any) -> Any:
        """The graph's results."""
        results = self.compiled(*args)
        for place, proven in self.proven.items():
            write_note(results[place], proven)
        return results


@dataclass(frozen=True, slots=True)
class Either:
    """A graph compiled twice: as it may be where all `notes` are there, and as it may be where they are not."""

    noted: Callable[..., Any]
    plain: Callable[..., Any]
    notes: Sequence[Note]

    def __call__(self, *args: Any) -> Any:
        """The graph's results."""
        return (self.noted if all(note.holds(args) for note in self.notes) else self.plain)(*args)


def guards_of(module: GraphModule) -> list[Guard]:
    """A guard for each buffer of a module from which something was proven."""
    return [_guard(buffer) for buffer in buffers_read(module) if buffer.handed is None]


def notes_of(module: GraphModule) -> list[Note]:
    """A check for each mask from another graph of which something was proven."""
    return [Note(buffer.place, buffer.handed) for buffer in buffers_read(module) if buffer.handed is not None]


def _guard(buffer: Buffer) -> Guard:
    guard = Guard(buffer.place, form_of(buffer.value))
    guard.holds([None] * buffer.place + [buffer.value])
    return guard
