"""Sequences that are padded to whole chunks: whether the padded one is what a loop runs over, or the one before.

A loop over padded queries, keys, values and decays is a linear attention of the padded length, whatever is then done to
its output; it need not be known what the padding holds.
"""

from collections.abc import Iterable

from torch.fx import Node

from attnopt.passes.reroll_sizes import name_of
from attnopt.passes.sizes import Size, hint, same, shape_of, size_of

PADS = ("constant_pad_nd", "pad")


def fills_up(node: Node, length: Size) -> bool:
    """Whether the node makes a sequence as long as the output, whose length is known while compiling."""
    if name_of(node) not in PADS or not isinstance(length, int):
        return False
    pairs = zip(shape_of(node.all_input_nodes[0]), shape_of(node), strict=True)
    return [after for before, after in pairs if not same(before, after)] == [length]


def can_be_tried(leaves: Iterable[Node], length: int) -> bool:
    """Whether a loop over these sequences can be tried at another length, if its length may be another.

    It can where a symbol is the length. Of an expression, such as a symbol rounded up to whole chunks, it is not known
    at which lengths it is that of the output as well. length: that seen while tracing.
    """
    sizes = [
        size_of(size)
        for leaf in leaves
        for size in getattr(leaf.meta["val"], "shape", ())
        if hint(size) == length
    ]
    symbolic = [size for size in sizes if not isinstance(size, int)]
    return not symbolic or any(size.is_Symbol for size in symbolic)
