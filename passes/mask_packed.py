"""Packed sequences: where positions start anew, and what their order then says of the order of the tokens."""

from collections.abc import Iterator, Mapping

import sympy
from torch.fx import Node

from attnopt.passes.mask_formula import Data, Formula, Lag, Number, Same, parts_of
from attnopt.passes.mask_reader import MaskReader
from attnopt.passes.mask_writes import arguments, operation


def with_positions_in_runs(reader: MaskReader, formula: Formula) -> Formula:
    """The formula with comparisons of positions read as comparisons of tokens, where both are in one run.

    A run is what `(diff(p) != 1).cumsum()` numbers: if tokens s and t have the same number, every step of p between
    them is 1, so that p[s] - p[t] is s - t.
    """
    parts = parts_of(formula)
    places = {data: at for part in parts for data, at in _places(reader, part)}
    if not places:
        return formula
    return reader.logic.conj(_as_tokens(reader, part, places) for part in parts)


def _as_tokens(reader: MaskReader, part: Formula, places: Mapping[Number, sympy.Expr]) -> Formula:
    if not isinstance(part, Lag) or part.first not in places or part.second not in places:
        return part
    return reader.logic.at_most_zero(places[part.first] - places[part.second] + part.by)


def _places(reader: MaskReader, part: Formula) -> Iterator[tuple[Number, sympy.Expr]]:
    """The positions of the query's and the key's token, if `part` says that both are in one run; and which tokens."""
    match part:
        case Same(Data(node, at_query), Data(other, at_key), True) if node is other:
            source = _numbered(node)
            if source is None or at_query[:-1] != at_key[:-1]:
                return
            for index in (at_query, at_key):
                (leaf, *others) = reader.element_at(source, index, node)  # type: ignore[misc]
                if not others:
                    yield leaf, index[-1]


def _numbered(node: Node) -> Node | None:
    """p, where the node is (diff(p, prepend=one element) != 1).cumsum() along the last dimension."""
    last = node.meta["val"].dim() - 1
    if operation(node) != "cumsum" or arguments(node)["dim"] % (last + 1) != last:
        return None
    breaks = arguments(node)["self"]
    if operation(breaks) not in ("ne", "not_equal") or arguments(breaks)["other"] != 1:
        return None
    steps = arguments(breaks)["self"]
    if operation(steps) != "diff":
        return None
    held = arguments(steps)
    before = held["prepend"]
    if held["n"] != 1 or held["append"] is not None or held["dim"] % (last + 1) != last or before is None:
        return None
    return held["self"] if before.meta["val"].shape[-1] == 1 else None
