"""What surrounds Q K^T and V in a site: masks, what empty rows return, sinks, what the output is multiplied by."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite

import torch
from torch.fx import Node

from attnopt.mask import FULL, Mask
from attnopt.passes.layout import Axes, Dims, Space
from attnopt.passes.logits import LogitsReader
from attnopt.passes.logits_found import Logits
from attnopt.passes.logits_summed import read_with_sums
from attnopt.passes.scores_blocks import block_biases
from attnopt.passes.scores_factors import is_by_key
from attnopt.passes.site import Filled, Operand, Result, Roles, assign_roles, flat, peel
from attnopt.passes.sizes import product
from attnopt.passes.softmax_form import Sink
from attnopt.passes.softmax_nodes import same_value
from attnopt.passes.terms import Fill, Scores, Term
from attnopt.passes.weights import Change
from attnopt.rule import Reject
from attnopt.spec import MEANS, EmptyRow


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a site sits: the rule, the root with its dimensions, those of the weights, the key axis, inner nodes.

    given: what the call says of its mask without a tensor. change: what becomes of the weights. sharp: as in `Form`.
    after: the inner nodes from the weights on.
    """

    rule: str
    root: Node
    out: Dims
    weights: Dims
    key: tuple[object, ...]
    interior: frozenset[Node]
    given: Mask = FULL
    change: Change = field(default_factory=Change)
    sink: Sink | None = None
    sharp: bool = False
    after: frozenset[Node] = frozenset()


#: exp() of this or less is 0, in fp64 too.
_VANISHING = -1000.0


def read_roles(space: Space, frame: Frame, scores: Scores, operands: tuple[Dims, Dims, Dims]) -> Roles:
    """What the axes of a site mean; where no number says how many heads share a key, keys are repeated for each."""
    weights = _facing(space, frame, scores, operands[1:])
    roles = assign_roles(space, *operands, weights, frame.key, _sink_axes(space, frame))  # type: ignore[arg-type]
    roles = _with_whole_rows(space, frame, scores, roles, operands[0])
    share = product(a.size for a in roles.share)
    return roles if isinstance(share, int) else replace(roles, kv_heads=roles.heads, share=())


def _facing(space: Space, frame: Frame, scores: Scores, keys: Sequence[Dims]) -> Dims:
    """The dimensions of the weights, with the queries beside the keys.

    keys: the dimensions of keys and values. Where these have no heads and queries stand before heads (DeepSeek-V2,
    arXiv 2405.04434, absorbed), queries are what masks tell apart, and heads what they do not.
    """
    key = {*space.leaves(frame.key)}  # type: ignore[arg-type]
    held = {a for dims in keys for a in flat(space, dims)} | key
    alone = [n for n, axes in enumerate(frame.weights) if axes and not held & {*space.leaves(axes)}]
    rank = len(frame.weights)
    if len(alone) != 2 or alone[-1] != rank - 2 or not key & {*space.leaves(frame.weights[-1])}:
        return frame.weights
    first, beside = ({*space.leaves(frame.weights[n])} for n in alone)
    parts: tuple[Fill | Term, ...] = (*scores.fills, *scores.terms)
    masks = [axes for part in parts if key & (axes := {*flat(space, part.dims)})]
    told = [bool(axes & first) - bool(axes & beside) for axes in masks]
    if 1 not in told or -1 in told:
        return frame.weights
    order = [n for n in range(rank) if n not in alone]
    return tuple(frame.weights[n] for n in (*order[:-1], *reversed(alone), order[-1]))


def _with_whole_rows(space: Space, frame: Frame, scores: Scores, roles: Roles, q: Dims) -> Roles:
    """Queries that come as rows and columns of an image, and are one dimension of the weights, are one axis.

    Not if a mask tells them apart, nor where queries hold them beside heads, as grouped heads are.
    """
    places = [space.leaves(axes) for axes in frame.weights]
    own = next((axes for axes in places if {*roles.query} & {*axes}), ())
    rows = tuple(a for a in own if a in roles.share or a in roles.query)
    heads = {*roles.kv_heads, *roles.batch}
    if rows != own or any({*rows} & {*axes} and heads & {*axes} for axes in space.resolve(q)):
        return roles
    change = frame.change
    fills: list[Fill] = [*scores.fills, *change.kept, *change.hidden, *change.multiplied]
    terms: list[Term] = [*scores.terms, *scores.factors, *change.times, *change.values]
    terms += [factor for term in scores.terms for factor in term.times]
    held = [*(fill.dims for fill in fills), *(term.dims for term in terms)]
    beside = [*(flat(space, dims) for dims in held), _sink_axes(space, frame)]
    if any({*rows} & {*axes} and not {*rows} <= {*axes} for axes in beside):
        return roles
    return replace(roles, query=rows, share=tuple(a for a in roles.share if a not in rows))


def _sink_axes(space: Space, frame: Frame) -> Axes:
    """The axes along which a sink varies."""
    term = None if frame.sink is None else frame.sink.term
    return () if term is None else flat(space, peel(space, term.node, term.dims)[1])


def _weighs_nothing(reader: LogitsReader, frame: Frame, fill: Fill) -> bool:
    """Whether a filled score is a weight of 0 in every row: without a shift, or beside a sink that is always seen."""
    if frame.sharp:
        return fill.value <= _VANISHING
    return frame.sink is not None and reader.is_hiding(fill)


def read_logits(reader: LogitsReader, scores: Scores, frame: Frame) -> Logits:
    """Masks and biases, and what a row without keys returns in the end."""
    change = frame.change
    fills = [replace(f, value=-torch.inf) if _weighs_nothing(reader, frame, f) else f for f in scores.fills]
    safe = reader.safe or change.zeroed or frame.sink is not None
    added = block_biases(reader.space, reader.roles, scores)
    reading = replace(reader, safe=safe, sinks=frame.sink is not None, biases=added)
    logits = read_with_sums(reading, fills, scores.terms)
    for name, operand in logits.operands.items():
        if (
            not name.startswith(("bias", "query_ids", "key_ids"))
            and operand.node.meta["val"].dtype != torch.bool
        ):
            raise Reject(
                "a mask holds numbers that are not proven to be 0 and 1", operand.node, len(scores.path)
            )
    if frame.sink is not None and logits.empty_row is not EmptyRow.NEVER:
        logits = replace(logits, empty_row=EmptyRow.ZERO)
    if frame.sharp and logits.empty_row in MEANS:
        logits = replace(logits, empty_row=EmptyRow.NAN)
    if change.hidden:
        logits = _masked_again(reader, logits, change.hidden, absolute=True)
    return _multiplied(reader, logits, change.multiplied) if change.multiplied else logits


def _multiplied(reader: LogitsReader, logits: Logits, masks: Sequence[Fill]) -> Logits:
    """The weights times 0 or 1: where the scores hid them before, or for some keys, whose values are, instead."""
    try:
        return _masked_again(reader, logits, masks, absolute=False)
    except Reject:
        if not all(is_by_key(reader.space, reader.roles, mask) for mask in masks):
            raise
    values = (Operand(mask.node, reader.space.resolve(mask.dims), dtype=torch.float32) for mask in masks)
    return replace(logits, values=(*logits.values, *values))


def _masked_again(reader: LogitsReader, logits: Logits, again: Iterable[Fill], *, absolute: bool) -> Logits:
    """The weights set to 0 (`absolute`), or times 0, where the scores hid them before: only empty rows notice."""
    fills = list(again)
    if logits.hidden_logit is not None:
        raise Reject(
            f"keys whose scores became {logits.hidden_logit:g}, which weighs, lose their weights after the softmax; "
            "fill the scores with -inf, and leave the second mask out",
            fills[0].node,
            9,
        )
    try:
        found = replace(reader, given=FULL).read([replace(f, value=-torch.inf) for f in fills], ())
    except Reject as reject:
        raise Reject(
            f"the weights are masked by a tensor that varies along the keys ({reject.reason})",
            fills[0].node,
            9,
        ) from None
    names = found.mask.operand_names()
    alike = all(_is_alike(found.operands[name], logits.operands.get(name)) for name in names)
    if not alike or logits.mask & found.mask != logits.mask:
        raise Reject(
            "the weights are masked after the softmax by something else than what masked the scores before it",
            fills[0].node,
            9,
        )
    becomes_zero = logits.empty_row in MEANS or (absolute and logits.empty_row is EmptyRow.NAN)
    if not becomes_zero:
        return logits
    if found.mask != logits.mask:
        raise Reject("rows without keys keep some of their weights after the softmax", fills[0].node, 9)
    return replace(logits, empty_row=EmptyRow.ZERO)


def _is_alike(one: Operand, other: Operand | None) -> bool:
    """Whether two operands hold the same, if perhaps computed twice."""
    return other is not None and replace(one, node=other.node) == other and same_value(one.node, other.node)


def read_sink(space: Space, roles: Roles, sink: Sink, shift: float) -> Operand | Filled:
    """The operand sink_logits: (H,), or (B, H, Sq) where it varies along more than the heads."""
    if sink.term is None:
        return Filled(sink.value - shift, (roles.heads,))
    if shift != 0:
        raise Reject("a number is added to the scores but not to the sinks beside them", sink.term.node, 9)
    if sink.several:
        node, dims, factor = sink.term.node, space.resolve(sink.term.dims), 1.0
    else:
        node, dims, factor = peel(space, sink.term.node, sink.term.dims)
    held = {a for axes in dims for a in axes} - {*sink.several}
    if held - {*roles.batch, *roles.heads, *roles.query}:
        raise Reject("the sinks vary along something other than batch, heads and queries", node, 9)
    layout = (roles.heads,) if held <= {*roles.heads} else (roles.batch, roles.heads, roles.query)
    if not sink.several:
        return Operand(node, dims, factor * sink.term.factor, layout=layout)
    return Operand(node, dims, layout=(*layout, sink.several), function="logsumexp")


def is_per_query(sink: Operand | Filled) -> bool:
    """Whether each query has its own sink, and not each head."""
    summed = isinstance(sink, Operand) and sink.function == "logsumexp"
    return len(sink.layout or ()) - summed == 3


def read_result(space: Space, roles: Roles, frame: Frame) -> Result:
    """The root's layout, and what the weights were multiplied by: the output is, instead."""
    change = frame.change
    if not isfinite(change.factor):
        raise Reject(f"the weights are multiplied by {change.factor}", frame.root, 9)
    rows = {*roles.batch, *roles.heads, *roles.query}
    kept = tuple(
        Operand(f.node, space.resolve(f.dims), negated=f.hides, function="keep") for f in change.kept
    )
    times = tuple(Operand(t.node, space.resolve(t.dims), inverse=t.inverse) for t in change.times)
    for part in (*times, *kept):
        if {a for axes in part.dims for a in axes} - rows:
            raise Reject("the weights are multiplied by a tensor that varies along the keys", part.node, 9)
    return Result(
        roles, space.resolve(frame.out), frame.root.meta["val"].dtype, change.factor, (*times, *kept)
    )
