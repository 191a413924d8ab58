"""The mask algebra: which keys j a query i may see, as a function of positions; pure data with one meaning, `dense()`.

Positions count from 0. A mask is True where the key is visible. Lengths that depend on the shapes stay symbolic
(`Length`), so a mask proven once holds for every sequence length.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import and_, or_

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Length:
    """`const + sq * Sq + sk * Sk`: a number of positions that follows from the shapes."""

    const: int = 0
    sq: int = 0
    sk: int = 0

    def at(self, sq: int, sk: int) -> int:
        """The number for given lengths (ints or SymInts)."""
        return self.const + self.sq * sq + self.sk * sk

    def __str__(self) -> str:
        terms = [(self.sk, "Sk"), (self.sq, "Sq"), (self.const, "")]
        text = "".join(_term(factor, name) for factor, name in terms if factor)
        return text.removeprefix("+") or "0"


#: The diagonal of a causal mask: key j is visible to query i when j <= i + offset.
TOP_LEFT = Length()
BOTTOM_RIGHT = Length(sq=-1, sk=1)


def _term(factor: int, name: str) -> str:
    digits = str(abs(factor)) if not name or abs(factor) != 1 else ""
    return f"{'+' if factor > 0 else '-'}{digits}{name}"


class Mask:
    """A set of visible (query, key) pairs. Combine with `&` and `|`."""

    __slots__ = ()

    def visible(self, i: Tensor, j: Tensor, sizes: tuple[int, int], operands: Mapping[str, Tensor]) -> Tensor:
        """Whether key j is visible to query i: bool, broadcastable to (B, H, Sq, Sk).

        i: (Sq, 1) and j: (1, Sk) int64 positions; sizes: (Sq, Sk); operands: tensors that the mask names.
        """
        raise NotImplementedError

    def dense(
        self,
        sq: int,
        sk: int,
        operands: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The mask as a bool tensor of shape (..., Sq, Sk): the definition of what it means."""
        i = torch.arange(sq, device=device)[:, None]
        j = torch.arange(sk, device=device)[None, :]
        return self.visible(i, j, (sq, sk), operands or {}).expand(*self._batch(operands or {}), sq, sk)

    def operand_names(self) -> tuple[str, ...]:
        """Names of the tensors this mask reads, in order, without repetition."""
        return tuple(dict.fromkeys(self._names()))

    def renamed(self, names: Mapping[str, str]) -> "Mask":
        """The same mask reading operands of other names."""
        del names
        return self

    def _names(self) -> Iterator[str]:
        return iter(())

    def _batch(self, operands: Mapping[str, Tensor]) -> tuple[int, ...]:
        dims = [operands[name].shape for name in self.operand_names()]
        if not dims:
            return ()
        return tuple(torch.broadcast_shapes(*((s[0], 1) if len(s) == 2 else s[:2] for s in dims)))

    def __and__(self, other: "Mask") -> "Mask":
        return _combine(And, self, other, identity=FULL, absorbing=None)

    def __or__(self, other: "Mask") -> "Mask":
        return _combine(Or, self, other, identity=None, absorbing=FULL)


@dataclass(frozen=True, slots=True)
class Full(Mask):
    """Every key is visible."""

    def visible(self, i: Tensor, j: Tensor, sizes: tuple[int, int], operands: Mapping[str, Tensor]) -> Tensor:
        del sizes, operands
        return torch.ones_like(i, dtype=torch.bool) & torch.ones_like(j, dtype=torch.bool)

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True, slots=True)
class Causal(Mask):
    """j <= i + offset. `TOP_LEFT` is torch's `is_causal`, `BOTTOM_RIGHT` aligns the last query with the last key."""

    offset: Length = TOP_LEFT

    def visible(self, i: Tensor, j: Tensor, sizes: tuple[int, int], operands: Mapping[str, Tensor]) -> Tensor:
        del operands
        return j <= i + self.offset.at(*sizes)

    def __str__(self) -> str:
        return "causal" if self.offset == TOP_LEFT else f"causal({self.offset})"


@dataclass(frozen=True, slots=True)
class Window(Mask):
    """j > i + offset - width: the last `width` keys, the query's own included; bounded on the left only."""

    width: int
    offset: Length = TOP_LEFT

    def visible(self, i: Tensor, j: Tensor, sizes: tuple[int, int], operands: Mapping[str, Tensor]) -> Tensor:
        del operands
        return j > i + self.offset.at(*sizes) - self.width

    def __str__(self) -> str:
        return f"window({self.width})" if self.offset == TOP_LEFT else f"window({self.width}, {self.offset})"


@dataclass(frozen=True, slots=True)
class First(Mask):
    """j < count: the first keys. With `|` a window: attention sinks; with `|` a causal mask: a prefix."""

    count: int

    def visible(self, i: Tensor, j: Tensor, sizes: tuple[int, int], operands: Mapping[str, Tensor]) -> Tensor:
        del sizes, operands
        return (j < self.count) & torch.ones_like(i, dtype=torch.bool)

    def __str__(self) -> str:
        return f"first({self.count})"


@dataclass(frozen=True, slots=True)
class KeyPadding(Mask):
    """Operand `name`: bool (B, Sk), True where the key is kept, whatever the query."""

    name: str

    def visible(self, i: Tensor, j: Tensor, sizes: tuple[int, int], operands: Mapping[str, Tensor]) -> Tensor:
        del j, sizes
        return operands[self.name][:, None, None, :] & torch.ones_like(i, dtype=torch.bool)

    def renamed(self, names: Mapping[str, str]) -> Mask:
        return replace(self, name=names[self.name])

    def _names(self) -> Iterator[str]:
        yield self.name

    def __str__(self) -> str:
        return "padding"


@dataclass(frozen=True, slots=True)
class Opaque(Mask):
    """Operand `name`: bool, broadcastable to (B, H, Sq, Sk), True where visible; nothing is known of its form."""

    name: str

    def visible(self, i: Tensor, j: Tensor, sizes: tuple[int, int], operands: Mapping[str, Tensor]) -> Tensor:
        del sizes
        return (
            operands[self.name] & torch.ones_like(i, dtype=torch.bool) & torch.ones_like(j, dtype=torch.bool)
        )

    def renamed(self, names: Mapping[str, str]) -> Mask:
        return replace(self, name=names[self.name])

    def _names(self) -> Iterator[str]:
        yield self.name

    def __str__(self) -> str:
        return "opaque"


@dataclass(frozen=True, slots=True)
class Several(Mask):
    """A combination of masks."""

    parts: tuple[Mask, ...]

    def renamed(self, names: Mapping[str, str]) -> Mask:
        return replace(self, parts=tuple(part.renamed(names) for part in self.parts))

    def _names(self) -> Iterator[str]:
        for part in self.parts:
            yield from part._names()


@dataclass(frozen=True, slots=True)
class And(Several):
    """Visible in every part."""

    def visible(self, i: Tensor, j: Tensor, sizes: tuple[int, int], operands: Mapping[str, Tensor]) -> Tensor:
        return reduce(and_, (part.visible(i, j, sizes, operands) for part in self.parts))

    def __str__(self) -> str:
        return " & ".join(f"({part})" if isinstance(part, Or) else str(part) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Or(Several):
    """Visible in some part."""

    def visible(self, i: Tensor, j: Tensor, sizes: tuple[int, int], operands: Mapping[str, Tensor]) -> Tensor:
        return reduce(or_, (part.visible(i, j, sizes, operands) for part in self.parts))

    def __str__(self) -> str:
        return " | ".join(f"({part})" if isinstance(part, And) else str(part) for part in self.parts)


FULL = Full()
CAUSAL = Causal()


def _combine(
    kind: type[And] | type[Or], left: Mask, right: Mask, *, identity: Mask | None, absorbing: Mask | None
) -> Mask:
    if absorbing in (left, right) and absorbing is not None:
        return absorbing
    parts: dict[Mask, None] = {}
    for side in (left, right):
        parts.update(dict.fromkeys(side.parts if isinstance(side, kind) else (side,)))
    kept = sorted((p for p in parts if p != identity), key=str)
    if not kept:
        return FULL
    return kept[0] if len(kept) == 1 else kind(tuple(kept))


@dataclass(frozen=True, slots=True)
class Band:
    """A mask in the form that blockwise kernels take.

    visible = ((causal and (window or sinks)) or prefix) and padding and each opaque tensor, where causal is
    j <= i + offset (absent: None), window j > i + offset - window (absent: None), sinks j < sinks, prefix j < prefix.
    """

    offset: Length | None = None
    window: int | None = None
    sinks: int = 0
    prefix: int = 0
    padding: str | None = None
    opaque: tuple[str, ...] = ()


def band(mask: Mask) -> Band | None:
    """`mask` as a Band, or None when it has another form."""
    found = Band()
    parts = mask.parts if isinstance(mask, And) else (mask,)
    for part in parts:
        merged = _merge(found, part)
        if merged is None:
            return None
        found = merged
    if found.window is not None and Causal(found.offset or TOP_LEFT) not in parts:
        return None  # a window bounds on one side only
    return found


def _merge(into: Band, part: Mask) -> Band | None:
    """`into` and one more conjunct, or None when the band has no place for it."""
    match part:
        case Full():
            return into
        case KeyPadding(name) if into.padding is None:
            return replace(into, padding=name)
        case Opaque(name):
            return replace(into, opaque=(*into.opaque, name))
        case Causal(offset) if into.offset in (None, offset) and not into.prefix:
            return replace(into, offset=offset)
        case Window(width, offset) if (
            into.window is None and into.offset in (None, offset) and not into.prefix
        ):
            return replace(into, offset=offset, window=width)
        case Or((First(count), Window(width, offset))) if into.window is None and into.offset in (
            None,
            offset,
        ):
            return replace(into, offset=offset, window=width, sinks=count)
        case Or((Causal(offset), First(count))) if into.offset is None:
            return replace(into, offset=offset, prefix=count)
    return None
