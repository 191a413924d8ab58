"""Given tensors: the form that is found in one gives back each of its elements."""

import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_trace import evaluate

from attnopt.passes.mask_bounds import POSITIONS, Bounds
from attnopt.passes.mask_formula import Logic
from attnopt.passes.mask_literals import Diagonals, Spaced, element_of, form_of

ROW, COLUMN = POSITIONS["i"], POSITIONS["j"]
SIZES = st.integers(2, 7)


def assert_gives_back(held: torch.Tensor) -> None:
    """Read as a matrix (1, R, 1, C)."""
    form = form_of(held)
    assert form is not None
    rows, columns = held.shape
    logic = Logic(Bounds({ROW: sympy.Integer(rows), COLUMN: sympy.Integer(columns)}))
    index = (sympy.Integer(0), ROW, sympy.Integer(0), COLUMN)
    value = element_of(form, index, (1, rows, 1, columns), logic)
    for r in range(rows):
        for c in range(columns):
            assert evaluate(value, {"i": r, "j": c}, {}) == held[r, c].item()


@given(SIZES, SIZES, st.integers(-7, 7), st.sampled_from([torch.bool, torch.uint8, torch.float32]))
def test_a_triangle_is_found_at_any_diagonal(rows, columns, diagonal, dtype):
    assert_gives_back(torch.ones(rows, columns, dtype=dtype).tril(diagonal))


@given(SIZES, SIZES, st.integers(-5, 5), st.integers(0, 4))
def test_a_band_is_found(rows, columns, diagonal, width):
    assert_gives_back(torch.ones(rows, columns).tril(diagonal).triu(diagonal - width))


@given(SIZES, SIZES)
def test_a_mask_of_minus_infinity_is_found(rows, columns):
    assert_gives_back(torch.full((rows, columns), -torch.inf).triu(1))


def test_the_form_does_not_depend_on_the_size():
    assert (
        form_of(torch.ones(5, 5).tril())
        == form_of(torch.ones(9, 9).tril())
        != form_of(torch.ones(5, 5).tril(1))
    )


def test_positions_are_evenly_spaced():
    assert form_of(torch.arange(3, 11)[None]) == Spaced(3.0, 1.0)
    assert form_of(torch.arange(8).float()) == Spaced(0.0, 1.0)
    assert form_of(torch.tensor([[[7]]])) == Spaced(7.0)


def test_what_has_no_form_is_data():
    hole = torch.ones(6, 6).tril()
    hole[4, 1] = 0
    rising = torch.arange(6)[:, None] - torch.arange(6)
    for held in (
        hole, rising, torch.tensor([1, 2, 4]), torch.rand(4, 4), torch.rand(6), torch.full((3, 3), torch.nan),
        torch.ones(2, 3, 4).tril(), torch.empty(0, 3), torch.ones(2, 2, dtype=torch.complex64),
        torch.tensor([2**60, 2**60 + 1]), torch.tensor([0.5, 1.0, 1.5]),
    ):  # fmt: skip
        assert form_of(held) is None, held


def test_a_single_row_or_column_that_steps_is_no_mask_over_pairs():
    assert form_of(torch.tensor([[1, 1, 0, 0]])) is None
    assert isinstance(form_of(torch.ones(2, 4).tril(1)), Diagonals)
