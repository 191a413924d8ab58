"""Operands that are known for a block of queries and keys, and nothing elsewhere."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from attnopt.passes.site import Operand


@dataclass(frozen=True, slots=True)
class Block(Operand):
    """pads: how many queries and keys stand before the block and behind it; there, the operand is 0."""

    pads: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))


def padded(value: Tensor, operand: Operand) -> Tensor:
    """`value` (..., rows, columns) of a block, with zeros around it; of any other operand as it is."""
    if not isinstance(operand, Block):
        return value
    rows, columns = operand.pads
    return functional.pad(value, (*columns, *rows))
