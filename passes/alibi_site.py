"""Logits with a bias that is linear in the distance, stated by its slopes; and the same with the bias as a tensor."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from attnopt.mask import BOTTOM_RIGHT, TOP_LEFT, Length, Mask, band
from attnopt.passes.alibi import Line, read_line
from attnopt.passes.layout import Axes
from attnopt.passes.logits import LogitsReader
from attnopt.passes.logits_found import Logits
from attnopt.passes.masks import may_have_empty_rows
from attnopt.passes.site import Filled, Operand, Roles, peel
from attnopt.passes.sizes import same
from attnopt.passes.terms import Fill, Term, floors, narrowest
from attnopt.rule import Reject
from attnopt.spec import Alibi, EmptyRow

#: What rows without keys return where a bias beside the mask changes nothing: nothing finite reaches them.
SETTLED = (EmptyRow.NEVER, EmptyRow.NAN, EmptyRow.ZERO)


def read_with_line(reader: LogitsReader, fills: Iterable[Fill], terms: Iterable[Term]) -> Logits:
    """`reader.read`, with the first bias that is proven to be linear in the distance stated as one.

    What a reading with the bias as a tensor gives is kept beside it, for kernels that are better off with that.
    """
    fills, terms = tuple(fills), tuple(terms)
    lined = next(filter(None, (_lined(reader, fills, terms, term) for term in terms)), None)
    if lined is None:
        return reader.read(fills, terms)
    try:
        plain = reader.read(fills, terms)
    except Reject:
        return lined
    return with_plain(lined, plain)


def with_plain(logits: Logits, plain: Logits) -> Logits:
    """The logits with another reading of them, which proves less, beside it, where both are served alike."""
    same_factors = (plain.keys, plain.values) == (logits.keys, logits.values)
    alike = plain.empty_row in (logits.empty_row, EmptyRow.ZERO) and same_factors
    return replace(logits, plain=plain) if alike and not plain.forward_only else logits


def _lined(
    reader: LogitsReader, fills: tuple[Fill, ...], terms: tuple[Term, ...], term: Term
) -> Logits | None:
    """The logits with `term` as a line, or None where it is none, or where rows without keys would notice."""
    found = _read_line(reader, term)
    if found is None or (reader.sinks and not found[0].exact):
        return None
    line, slopes = found
    rest = tuple(other for other in terms if other is not term)
    try:
        logits = replace(reader, given=reader.given & line.visible).read(fills, rest)
    except Reject:
        return None
    if logits.hidden_logit is not None and not (line.exact and _lies_first(fills, term)):
        return None  # a number in a row takes notice of what is added to the others
    settled = logits.empty_row in SETTLED or _is_filled_later(logits, fills, rest, term)
    if not settled or (math.isfinite(line.fill) and _may_be_empty(reader, line.visible)):
        return None
    if floors(term.casts) and logits.empty_row is not EmptyRow.NEVER:  # beside a visible key none lies so low
        return None
    return replace(logits, alibi=_named(reader, line, logits), slopes=slopes)


def _is_filled_later(logits: Logits, fills: Sequence[Fill], rest: Sequence[Term], term: Term) -> bool:
    """Whether rows without keys are the mean of the values because the finished logits were filled."""
    return logits.empty_row is EmptyRow.UNIFORM and bool(fills) and _lies_first(fills, term) and not rest


def _lies_first(fills: Sequence[Fill], term: Term) -> bool:
    """Whether a term is added before anything is filled in."""
    return all(f.at is not None and term.at is not None and term.at < f.at for f in fills)


def _may_be_empty(reader: LogitsReader, mask: Mask) -> bool:
    sizes = reader.sizes()
    return may_have_empty_rows(mask, sizes["i"], sizes["j"])


def _read_line(reader: LogitsReader, term: Term) -> tuple[Line, Operand | Filled] | None:
    """The line that a term is, and its slopes; the term is peeled, since heads may be merged into the batch."""
    node, dims, factor = peel(reader.space, term.node, term.dims)
    if not node.meta["val"].dtype.is_floating_point:
        node, dims, factor = term.node, term.dims, 1.0
    held = node.meta["val"].dtype
    if term.times or not held.is_floating_point or narrowest(term.casts, held) != held:
        return None
    roles = reader.roles_of(dims)
    if roles is None or not _stays_precise(term):
        return None
    line = read_line(node, roles, reader.sizes(), at=term.at if node is term.node else None)
    slopes = None if line is None else _slopes(line, reader.roles, factor * term.factor)
    return None if line is None or slopes is None else (line, slopes)


def _stays_precise(term: Term) -> bool:
    return bool(term.node.meta["val"].dtype.itemsize >= torch.float32.itemsize)


def _slopes(line: Line, roles: Roles, factor: float) -> Operand | Filled | None:
    """The operand: (H,), or (B, H) where the slopes are not the same for all sequences; None if no tensor has them."""
    factor = math.prod([factor, *(f.value for f in line.slope)])
    axes: dict[str | None, Axes] = {None: (), "b": roles.batch, "h": roles.heads}
    parts = [
        Operand(f.source.node, tuple(axes[role] for role in f.source.roles), inverse=f.inverse)
        for f in line.slope
        if f.source is not None
    ]
    first = next((part for part in parts if not part.inverse), None)
    if first is None:
        return Filled(factor, (roles.heads,)) if not parts else None
    times = tuple(part for part in parts if part is not first)
    varies = any(role == "b" for f in line.slope if f.source is not None for role in f.source.roles)
    dtype = torch.promote_types(first.node.meta["val"].dtype, torch.float32)
    layout = (roles.batch, roles.heads) if varies else (roles.heads,)
    return replace(first, factor=factor, times=times, dtype=dtype, layout=layout)


def _named(reader: LogitsReader, line: Line, logits: Logits) -> Alibi:
    """From the diagonal of the mask on where that is free: softmax takes no notice of what a whole row has in common.

    Below that diagonal a symmetric line is a plain one.
    """
    form, sizes = band(logits.mask), reader.sizes()
    diagonal = form.offset if form is not None else None
    ends = TOP_LEFT if same(sizes["i"], sizes["j"]) else BOTTOM_RIGHT
    below = form is not None and form.offset == line.offset and not form.prefix
    if line.symmetric and not below:
        return Alibi(line.offset or TOP_LEFT, symmetric=True)
    is_free = not reader.sinks and logits.hidden_logit is None
    offset: Length = (diagonal or ends) if is_free else line.offset or ends
    return Alibi(offset)
