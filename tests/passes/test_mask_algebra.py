"""Laws of naming: offsets in every way sizes can state them, and no claim that each query sees a key unless it does."""

import itertools

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from attnopt.mask import (
    BOTTOM_RIGHT,
    FULL,
    TOP_LEFT,
    Causal,
    First,
    KeyPadding,
    Length,
    Mask,
    Opaque,
    Window,
    band,
)
from attnopt.passes.mask_algebra import algebra_for, may_have_empty_rows, with_implied_diagonal
from attnopt.passes.mask_bounds import POSITIONS, Bounds
from attnopt.passes.mask_formula import Logic

B, H, I, J = (POSITIONS[role] for role in ("b", "h", "i", "j"))
S, T = (sympy.Symbol(name, integer=True, positive=True) for name in ("s", "t"))


def named(sq, sk, *exprs, heads=3):
    """The mask of a conjunction of `expr <= 0`."""
    counts = {B: sympy.Integer(1), H: sympy.Integer(heads), I: sympy.sympify(sq), J: sympy.sympify(sk)}
    logic = Logic(Bounds(counts))
    formula = logic.conj(map(logic.at_most_zero, exprs))
    algebra = algebra_for(logic.bounds, formula)
    mask = algebra.mask(formula)
    return None if mask is None else with_implied_diagonal(algebra, mask)


OFFSETS = [
    ((S, S), 0, TOP_LEFT),
    ((S, T), 0, TOP_LEFT),
    ((S, T), T - S, BOTTOM_RIGHT),
    ((S, S + T), T, BOTTOM_RIGHT),
    ((4, 9), 5, BOTTOM_RIGHT),
    ((4, 9), 2, Length(2)),
    ((S, T), T, Length(0, 0, 1)),
    ((S, T), 2 * S - 3, Length(-3, 2, 0)),
    ((S, T), T - S + 1, Length(1, -1, 1)),
    ((S, 2 * S), S, BOTTOM_RIGHT),
]


@pytest.mark.parametrize(("sizes", "offset", "expected"), OFFSETS)
def test_an_offset_has_a_name(sizes, offset, expected):
    assert named(*sizes, J - I - offset) in (Causal(expected), FULL)
    assert named(64, 64, J - I - 3) == Causal(Length(3))


def test_an_offset_that_sizes_do_not_tell_has_none():
    past = sympy.Symbol("past", integer=True)
    assert named(S, T, J - I - past) is None


NAMES = [
    (J - I, "causal"),
    (I - J - 2, "window(3)"),
    (J - 3, "first(4)"),
    (J + H - I, None),
    (J + 2 * B - I, "causal"),  # one batch only
    (3 - J, None),
    (I - 3, None),
    (J - 2 * I, None),
    (I * J - 2, None),
    (I + J - 5, None),
]


@pytest.mark.parametrize(("expr", "expected"), NAMES)
def test_a_line_has_a_name_if_it_is_a_diagonal_or_the_first_columns(expr, expected):
    found = named(S, S, expr)
    assert (found and str(found)) == expected


def test_windows_count_from_the_causal_diagonal():
    assert named(S, T, J - I - (T - S), I + (T - S) - J - 3) == Causal(BOTTOM_RIGHT) & Window(4, BOTTOM_RIGHT)
    assert named(S, S, J - I - 2, I - J - 2) == Causal(Length(2)) & Window(5, Length(2))


def test_a_window_of_one_query_is_bounded_on_both_sides():
    mask = named(1, T, T - 3 - J)
    assert str(mask) == "causal(Sk-Sq) & window(3, Sk-Sq)"
    assert band(mask) is not None


def test_nothing_visible_is_a_mask():
    assert named(4, 4, sympy.Integer(1)) == First(0)


offsets = st.builds(Length, st.integers(-2, 3), st.integers(-1, 1), st.integers(-1, 1))
plain = st.one_of(
    st.just(FULL),
    st.builds(Causal, offsets),
    st.builds(Window, st.integers(-1, 4), offsets),
    st.builds(First, st.integers(0, 4)),
)
masks = st.recursive(
    plain, lambda m: st.builds(Mask.__and__, m, m) | st.builds(Mask.__or__, m, m), max_leaves=4
)


@given(masks, st.integers(1, 6), st.integers(1, 6))
def test_no_row_is_empty_where_that_is_said(mask, sq, sk):
    some_empty = bool((~mask.dense(sq, sk)).all(-1).any())
    assert may_have_empty_rows(mask, sq, sk) or not some_empty


@given(masks)
def test_no_row_is_empty_at_any_size_where_that_is_said(mask):
    for sizes in ((S, S), (S, T), (S, S + T)):
        if not may_have_empty_rows(mask, *sizes):
            for s, t in itertools.product(range(1, 5), repeat=2):
                sq, sk = (int(sympy.sympify(size).subs({S: s, T: t})) for size in sizes)
                assert mask.dense(sq, sk).any(-1).all()


SURE = [
    (FULL, (S, T)),
    (Causal(), (S, T)),
    (Causal(BOTTOM_RIGHT), (S, S + T)),
    (Causal() & Window(1), (S, S)),
    (Causal(BOTTOM_RIGHT) & Window(3, BOTTOM_RIGHT), (S, S + T)),
    (Causal() & (First(2) | Window(3)), (S, S)),
    (Causal() & (First(1) | Window(3)), (S, T)),
    (Causal(Length(-1)) | First(1), (S, T)),
    (First(3), (S, T)),
    (KeyPadding("padding") | Causal(), (S, T)),
]


@pytest.mark.parametrize(("mask", "sizes"), SURE, ids=str)
def test_common_masks_are_known_to_show_each_query_a_key(mask, sizes):
    assert not may_have_empty_rows(mask, *sizes)


UNSURE = [
    (FULL, (3, 0)),
    (Causal(BOTTOM_RIGHT), (S, T)),
    (Causal(Length(-1)), (S, S)),
    (Causal() & Window(3), (S, T)),
    (Causal() & Window(0), (S, S)),
    (First(0), (S, T)),
    (KeyPadding("padding"), (S, S)),
    (Causal() & Opaque("mask"), (S, S)),
]


@pytest.mark.parametrize(("mask", "sizes"), UNSURE, ids=str)
def test_masks_that_may_hide_every_key_are_not(mask, sizes):
    assert may_have_empty_rows(mask, *sizes)
