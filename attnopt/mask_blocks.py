"""Masks by equality: chunks of positions, and packed sequences; the part of the mask algebra that no band states."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from attnopt.mask import TOP_LEFT, Length, Mask

#: How the chunk of a visible key compares with the query's: the same; that or an earlier one; that or a later one.
Side = Literal["same", "until", "since"]


@dataclass(frozen=True, slots=True)
class Chunk(Mask):
    """Positions in chunks of `size`: key j + key is in chunk (j + key) // size, query i + query likewise.

    side "same": both are in one chunk (with a causal mask, the chunked attention of Llama 4). "until": the key's is not
    later (causal between blocks, bidirectional inside). "since": the key's is not earlier.
    """

    size: int
    query: Length = TOP_LEFT
    key: Length = TOP_LEFT
    side: Side = "same"

    def visible(self, i: Tensor, j: Tensor, sizes: tuple[int, int], operands: Mapping[str, Tensor]) -> Tensor:
        del operands
        at_key = torch.div(j + self.key.at(*sizes), self.size, rounding_mode="floor")
        at_query = torch.div(i + self.query.at(*sizes), self.size, rounding_mode="floor")
        match self.side:
            case "same":
                return at_key == at_query
            case "until":
                return at_key <= at_query
        return at_key >= at_query

    def __str__(self) -> str:
        moved = [f"{name} {at}" for name, at in (("i", self.query), ("j", self.key)) if at != TOP_LEFT]
        kind = "chunk" if self.side == "same" else f"{self.side} chunk"
        return f"{kind}({', '.join([str(self.size), *moved])})"


@dataclass(frozen=True, slots=True)
class Segments(Mask):
    """Operands `query` and `key`: integers (B, Sq) and (B, Sk); a key is visible if it has the query's number.

    aligned: for certain, key i has the number of query i.
    """

    query: str
    key: str
    aligned: bool = False

    def visible(self, i: Tensor, j: Tensor, sizes: tuple[int, int], operands: Mapping[str, Tensor]) -> Tensor:
        del i, j, sizes
        return operands[self.query][:, None, :, None] == operands[self.key][:, None, None, :]

    def renamed(self, names: Mapping[str, str]) -> Mask:
        return replace(self, query=names[self.query], key=names[self.key])

    def _names(self) -> Iterator[str]:
        yield from (self.query, self.key)

    def __str__(self) -> str:
        return "segments"
