"""Comparisons with chunks are read as what they are: checked at every position."""

from itertools import product

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, PythonMod

from attnopt.passes.mask_chunks import KEY, QUERY, ChunkLine, chunk_line

PLACES = list(product(range(13), repeat=2))
SMALL = st.integers(-9, 9)


def says(line: ChunkLine, i: int, j: int) -> bool:
    key, query = (j + int(line.key)) // line.size, (i + int(line.query)) // line.size
    return {"same": key == query, "until": key <= query, "since": key >= query}[line.side]


def assert_true(expr: sympy.Expr, line: ChunkLine) -> None:
    for i, j in PLACES:
        assert says(line, i, j) == bool(expr.subs({QUERY: i, KEY: j}) <= 0), (expr, line, i, j)


@given(st.sampled_from([1, -1]), st.integers(1, 5), SMALL, SMALL, SMALL)
def test_chunks_against_chunks(sign: int, size: int, query: int, key: int, rest: int) -> None:
    expr = sympy.expand(sign * (FloorDiv(KEY + key, size) - FloorDiv(QUERY + query, size)) + rest)
    line = chunk_line(expr)
    assert line is not None or size == 1
    if line is not None:
        assert_true(expr, line)


@given(st.sampled_from([1, -1]), st.integers(2, 5), SMALL, SMALL, st.booleans())
def test_positions_against_the_ends_of_chunks(
    sign: int, size: int, start: int, rest: int, by_key: bool
) -> None:
    chunked, plain = (KEY, QUERY) if by_key else (QUERY, KEY)
    expr = sympy.expand(sign * (size * FloorDiv(chunked + start, size) - plain) + rest)
    line = chunk_line(expr)
    assert line is not None
    assert_true(expr, line)


@given(st.integers(2, 5), SMALL)
def test_distances_against_remainders(size: int, rest: int) -> None:
    expr = QUERY - KEY - PythonMod(QUERY, size) + rest
    line = chunk_line(expr)
    assert line is not None
    assert_true(expr, line)


@pytest.mark.parametrize(
    "expr",
    [
        KEY - QUERY,
        FloorDiv(KEY, 4) - FloorDiv(QUERY, 3),
        FloorDiv(KEY, 4) - 2 * FloorDiv(QUERY, 4),
        FloorDiv(KEY, 4) + FloorDiv(QUERY, 4) - 3,
        3 * FloorDiv(QUERY, 4) - KEY,
        FloorDiv(KEY, 4) - 2,
        FloorDiv(KEY - QUERY, 4),
        FloorDiv(KEY, 4) - FloorDiv(QUERY, 4) + QUERY,
    ],
    ids=str,
)
def test_what_is_no_comparison_of_chunks_is_none(expr: sympy.Expr) -> None:
    assert chunk_line(expr) is None
