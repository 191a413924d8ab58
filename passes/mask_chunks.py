"""Stairs: conditions that compare the chunk of a key with the chunk of a query."""

from dataclasses import dataclass

import sympy
from torch.utils._sympy.functions import FloorDiv, PythonMod

from attnopt.mask_blocks import Side
from attnopt.passes.mask_bounds import POSITIONS

QUERY, KEY = POSITIONS["i"], POSITIONS["j"]


@dataclass(frozen=True, slots=True)
class ChunkLine:
    """The chunk of the key, (j + key) // size, against that of the query, (i + query) // size."""

    size: int
    query: sympy.Expr
    key: sympy.Expr
    side: Side


@dataclass(frozen=True, slots=True)
class _Step:
    """factor * ((position + start) // size), or, without a size, factor * position."""

    factor: int
    start: sympy.Expr
    size: int | None


def chunk_line(expr: sympy.Expr) -> ChunkLine | None:
    """What expr <= 0 says of chunks, or None if it says no such thing."""
    if not expr.has(FloorDiv, PythonMod):
        return None
    expr = sympy.expand(expr.replace(PythonMod, lambda a, b: a - b * FloorDiv(a, b)))
    terms = dict(expr.as_coefficients_dict())
    query, key = _take(terms, QUERY), _take(terms, KEY)
    rest = sum((factor * term for term, factor in terms.items()), start=sympy.Integer(0))
    if query is None or key is None or rest.has(QUERY, KEY):
        return None
    match query.size, key.size:
        case int(size), int(other) if size == other and query.factor == -key.factor:
            return _between_chunks(query, key, rest, size)
        case int(size), None if query.factor == -size * key.factor:
            return _key_at_chunk(query, key, rest, size)
        case None, int(size) if key.factor == -size * query.factor:
            return _query_at_chunk(query, key, rest, size)
    return None


def _take(terms: dict[sympy.Expr, sympy.Number], position: sympy.Symbol) -> _Step | None:
    """Removes the one term with this position."""
    found = [term for term in terms if term.has(position)]
    if len(found) != 1 or not terms[found[0]].is_Integer:
        return None
    factor = int(terms.pop(found[0]))
    if found[0] == position:
        return _Step(factor, sympy.Integer(0), None)
    if not isinstance(found[0], FloorDiv) or not found[0].args[1].is_Integer:
        return None
    start = sympy.expand(found[0].args[0] - position)
    return None if start.has(QUERY, KEY) else _Step(factor, start, int(found[0].args[1]))


def _between_chunks(query: _Step, key: _Step, rest: sympy.Expr, size: int) -> ChunkLine | None:
    """±(chunk of the key - chunk of the query) + rest <= 0."""
    steps = rest / abs(key.factor)
    if not steps.is_Integer:
        return None
    if key.factor > 0:
        return ChunkLine(size, query.start, key.start + steps * size, "until")
    return ChunkLine(size, query.start + steps * size, key.start, "since")


def _key_at_chunk(query: _Step, key: _Step, rest: sympy.Expr, size: int) -> ChunkLine | None:
    """±(j - size * chunk of the query) + rest <= 0."""
    if key.factor == 1:
        return ChunkLine(size, query.start, sympy.expand(rest - 1 + size), "until")
    return ChunkLine(size, query.start, -rest, "since") if key.factor == -1 else None


def _query_at_chunk(query: _Step, key: _Step, rest: sympy.Expr, size: int) -> ChunkLine | None:
    """±(i - size * chunk of the key) + rest <= 0."""
    if query.factor == 1:
        return ChunkLine(size, sympy.expand(rest - 1 + size), key.start, "since")
    return ChunkLine(size, -rest, key.start, "until") if query.factor == -1 else None
