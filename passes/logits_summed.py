"""Biases that are the sum of a mask and a bias: scores + (bias + mask) hides keys as (scores + bias) + mask does.

T5 adds them once, for all its layers (https://github.com/google-research/text-to-text-transfer-transformer).
"""

from collections.abc import Iterable, Iterator

import torch
from torch.fx import Node

from attnopt.mask import FULL
from attnopt.passes.alibi_site import read_with_line, with_plain
from attnopt.passes.constants import present
from attnopt.passes.layout import Dims, broadcast_up
from attnopt.passes.logits import LogitsReader
from attnopt.passes.logits_found import Logits
from attnopt.passes.logits_parted import MOST_STEPS, above
from attnopt.passes.mask_writes import arguments, writes_after
from attnopt.passes.masks import may_have_empty_rows
from attnopt.passes.sizes import shape_of
from attnopt.passes.terms import Fill, Term
from attnopt.rule import Reject


def read_with_sums(reader: LogitsReader, fills: Iterable[Fill], terms: Iterable[Term]) -> Logits:
    """The logits, with the masks that were added to biases told apart, where each query surely sees a key.

    What a reading with the sums as they are gives is kept beside it, for kernels that read a tensor anyway.
    """
    fills, terms = tuple(fills), tuple(terms)
    parted = tuple(part for term in terms for part in _apart(reader, term))
    if len(parted) == len(terms):
        return read_with_line(reader, fills, terms)
    try:
        whole = read_with_line(reader, fills, terms)
    except Reject:
        whole = None
    if whole is not None and whole.alibi is not None:
        return whole
    found = _surely_seen(reader, fills, parted)
    if found is None:
        return whole or read_with_line(reader, fills, terms)
    return found if whole is None or found.plain is not None else with_plain(found, whole)


def _surely_seen(reader: LogitsReader, fills: tuple[Fill, ...], terms: tuple[Term, ...]) -> Logits | None:
    """The logits if their mask is proven to leave each query a key: then what it hides weighs nothing."""
    try:
        found = read_with_line(reader, fills, terms)
    except Reject:
        return None
    sizes = reader.sizes()
    seen = found.mask != FULL and not may_have_empty_rows(found.mask, sizes["i"], sizes["j"])
    return found if seen and not found.forward_only and found.hidden_logit is None else None


def _apart(reader: LogitsReader, term: Term) -> Iterator[Term]:
    """The addends of a bias, where one of them is a mask; else the bias itself."""
    addends = () if reader.additive(term) is not None else _addends(reader, term)
    if all(reader.additive(addend) is None for addend in addends):
        yield term
        return
    for addend in addends:
        yield from _apart(reader, addend)


def _addends(reader: LogitsReader, term: Term) -> tuple[Term, ...]:
    """Both tensors of which an added one is the sum; () if it is none, or is multiplied or written to on its way."""
    node, dims, user = term.node, term.dims, term.at
    for _ in range(MOST_STEPS):
        if term.times or term.tops or writes_after(node, user):
            return ()
        if node.target == torch.ops.aten.add.Tensor:
            return _sides(node, dims, term)
        higher = above(reader.space, node, dims)
        if higher is None:
            return ()
        user, (node, dims) = node, higher
    return ()


def _sides(node: Node, dims: Dims, term: Term) -> tuple[Term, ...]:
    call = arguments(node)
    sides = [call["self"], call["other"]]
    tensors = [x for x in sides if isinstance(x, Node) and present(x) is None]
    if len(tensors) < len(sides) or present(call["alpha"]) != 1 or not all(map(_is_float, tensors)):
        return ()
    return tuple(
        Term(x, broadcast_up(dims, shape_of(x)), term.factor, casts=term.casts, at=node) for x in tensors
    )


def _is_float(node: Node) -> bool:
    return bool(node.meta["val"].dtype.is_floating_point)
