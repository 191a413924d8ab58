"""The law by which a rotation is told: shifting all positions alike changes no score; and what spoils it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.mask_writes import operation
from attnopt.passes.rope_slice import Slice, is_float, is_whole
from attnopt.passes.rope_trial import Side, Trial, counting_dim, shifted
from attnopt.passes.sizes import is_float_input
from attnopt.rule import Reject

#: Shifts of all positions that are tried.
SHIFTS = (1, 2, 5, 64)
TOLERANCE = 1e-9
#: Of a table so many shifts are tried at most.
MOST_SHIFTS = 2000


def check_precision(cut: Slice) -> None:
    """Positions have to be exact until frequencies meet them."""
    counting = cut.below(cut.sources) & cut.tables
    for node in cut.nodes:
        if node not in counting or operation(node) not in {"to", "_to_copy", "type_as"}:
            continue
        value, above = node.meta["val"], node.all_input_nodes[0]
        if is_float(node) and value.dtype.itemsize < 4 and (is_whole(above) or above in cut.sources):
            raise Reject(
                f"positions are held in {value.dtype}, which does not tell large ones apart; wanted float32",
                node,
            )


def check_lengths(cut: Slice) -> None:
    """Frequencies must not change with the length of the text: a key is turned once."""
    for node in cut.nodes:
        if node not in cut.tables or operation(node) not in {"mul", "div", "pow"}:
            continue
        for size in (n.meta.get("val") for n in node.all_input_nodes):
            if isinstance(size, torch.SymInt | torch.SymFloat) and not (
                size.node.expr.is_number or is_float_input(size)
            ):
                raise Reject(
                    "frequencies depend on the length (as in dynamic NTK): wanted one table for all", node
                )


def positions(drawn: Trial, side: Side) -> tuple[Node, ...]:
    """The sources that are positions: each number of them moves its own query, or key, and no other.

    Sources that move all of them are numbers of features, of which frequencies are made.
    """
    before = drawn.run(side, {})
    return tuple(node for node in drawn.slices[side].sources if _counts(drawn, side, node, before))


def _counts(drawn: Trial, side: Side, node: Node, before: Tensor) -> bool:
    count, rows = drawn.count(node), before.shape[2]
    if count > rows:
        return False
    first = 0 if side == "q" else rows - count
    for place in sorted({0, count // 2, count - 1}):
        moved = _rows_moved(drawn, side, node, before, place)
        if len(moved) != 1:
            return False
        if moved != {first + place} or (side == "q" and count != rows):
            name = "query" if side == "q" else "key"
            raise Reject(
                f"position {place} of {node.name} turns {name} {min(moved)}; wanted its own, {first + place}",
                node,
            )
    if not _is_by_one(drawn, node):
        raise Reject(f"positions in {node.name} do not count up by one: wanted one more for each token", node)
    return True


def _is_by_one(drawn: Trial, node: Node) -> bool:
    """Whether a source counts up by one; a slice of a table does."""
    if any(node in cut.rows for cut in drawn.slices.values()) or drawn.count(node) < 2:
        return True
    value = drawn.values[node]
    steps = value.diff(dim=counting_dim(value.shape, drawn.counts))
    return bool((steps == 1).all())


def turns_apart(drawn: Trial, sources: Sequence[Node]) -> bool:
    """Whether each sequence may have positions of its own: they turn its queries as they turn all, and no others.

    Some rows are shifted at a time, by the digits of their numbers, so that any two are told apart.
    """
    before, after = drawn.run("q", {}), drawn.run("q", shifted(sources, 5))
    rows = torch.arange(before.shape[0]) + 1
    if not all(_has_rows(drawn, node, len(rows)) for node in sources):
        return False
    for digit in range(len(rows).bit_length()):
        chosen = (rows >> digit) % 2 == 1
        wanted = torch.where(chosen[:, None, None, None], after, before)
        try:
            moved = drawn.run("q", dict.fromkeys(sources, chosen.long()[:, None] * 5))
        except (RuntimeError, ValueError, IndexError):
            return False
        if moved.shape != wanted.shape or float((moved - wanted).abs().max()) > TOLERANCE:
            return False
    return True


def _has_rows(drawn: Trial, node: Node, batch: int) -> bool:
    """Whether a source has a dimension for the sequences before the one along which it counts."""
    value = drawn.values[node]
    if any(node in cut.rows for cut in drawn.slices.values()) or value.dim() < 2:
        return False
    is_last = counting_dim(value.shape, drawn.counts) == value.dim() - 1
    return is_last and int(value.shape[-2]) in (1, batch)


def _rows_moved(drawn: Trial, side: Side, node: Node, before: Tensor, place: int) -> set[int]:
    """Which rows change when one of the numbers of a source does."""
    after = drawn.run(side, {node: drawn.one(node, place)})
    changed = (after != before).any(3).any(1).any(0)
    return {int(n) for n in changed.nonzero().flatten()}


def check_law(drawn: Trial, sources: Mapping[Side, tuple[Node, ...]]) -> None:
    """Shifting all positions alike changes no score between the queries and the keys that the graph turns itself."""
    expected, keys = _scores(drawn, sources, 0)
    size = expected.abs().max() + 1.0
    for by in _shifts(drawn, sources):
        scores, _ = _scores(drawn, sources, by)
        error = float(((scores - expected).abs()[..., keys] / size).max())
        if not error <= tolerance(drawn, by):
            raise Reject(
                f"scores depend on more than the distance of positions: shifting all by {by} changes them by "
                f"{error:.1e}. Wanted queries and keys that turn by the same frequencies at the same positions",
                drawn.slices["q"].roots[0],
            )


def tolerance(drawn: Trial, by: int) -> float:
    """Of computed rotations, rounding in double precision; tables hold what single precision made of t * frequency."""
    return TOLERANCE + (2.0**-22 * (64 + by) if drawn.held else 0.0)


def _shifts(drawn: Trial, sources: Mapping[Side, tuple[Node, ...]]) -> Sequence[int]:
    """A few where a formula says what comes next; of a table so many that each row is seen."""
    if not drawn.held:
        return SHIFTS
    rows = max(value.shape[dim] for value in drawn.held.values() for dim in range(value.dim()))
    most = next((by for by in range(rows, 0, -1) if _reaches(drawn, sources, by)), 0)
    step = max(1, min(drawn.count(node) for node in sources["q"]) - 1)
    if most // step > MOST_SHIFTS:
        raise Reject(f"rotations are looked up in a table of {rows} rows, more than can be tried out")
    return (*range(1, most, step), most)


def _reaches(drawn: Trial, sources: Mapping[Side, tuple[Node, ...]], by: int) -> bool:
    """Whether the tables have rows for all positions shifted by so many."""
    try:
        _scores(drawn, sources, by)
    except (IndexError, RuntimeError):
        return False
    return True


def _scores(drawn: Trial, sources: Mapping[Side, tuple[Node, ...]], by: int) -> tuple[Tensor, slice]:
    """All scores (B, H, Sq, Sk), and the columns of the keys that the graph turns."""
    q, k = (drawn.run(side, shifted(sources[side], by)) for side in ("q", "k"))
    own = max(drawn.count(node) for node in sources["k"])
    return q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT, slice(k.shape[2] - own, None)
