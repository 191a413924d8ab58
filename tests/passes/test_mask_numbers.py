"""Laws of leaf arithmetic: as torch rounds, as Python computes, and never more certain than either."""

import math

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnopt.passes.mask_bounds import POSITIONS, Bounds
from attnopt.passes.mask_formula import FALSE, TRUE, AtMostZero, Call, Logic, NotUnderstood
from attnopt.passes.mask_numbers import (
    EXACT_BELOW,
    as_leaf,
    at_most,
    below,
    compute,
    convert,
    equal,
    from_float,
    is_constant,
    is_exact,
    round_to,
)

I, J = POSITIONS["i"], POSITIONS["j"]
BOUNDS = Bounds({I: sympy.Integer(300), J: sympy.Symbol("s", integer=True, positive=True)})
LOGIC = Logic(BOUNDS)
DTYPES = sorted(EXACT_BELOW, key=str)

doubles = st.floats(allow_nan=False)


@pytest.mark.parametrize("dtype", DTYPES)
@given(value=st.floats(-3e38, 3e38) | st.floats(-7e4, 7e4) | st.floats(-1, 1))
def test_rounding_is_torchs(dtype, value):
    assert round_to(value, dtype) == float(
        torch.tensor(value, dtype=torch.float32 if dtype.itemsize < 8 else dtype).to(dtype)
    )


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float64])
def test_what_is_too_large_becomes_infinite(dtype):
    most = sympy.Integer(int(torch.finfo(dtype).max))
    assert [convert(n * most, dtype, BOUNDS) for n in (1, 2, -2)] == [most, math.inf, -math.inf]


@given(st.floats(-1e6, 1e6), st.sampled_from(DTYPES))
def test_a_constant_is_exact_if_rounding_keeps_it(value, dtype):
    assert is_exact(from_float(value), dtype) == (round_to(value, dtype) == value)


@given(doubles)
def test_whole_numbers_are_integers_however_written(value):
    leaf = from_float(value)
    assert is_constant(leaf)
    assert isinstance(leaf, sympy.Integer) == value.is_integer()
    assert float(leaf) == value


@given(doubles, doubles, st.sampled_from(["add", "sub", "mul", "maximum", "minimum"]))
def test_constants_are_computed_as_in_python(a, b, operation):
    python = {"add": a + b, "sub": a - b, "mul": a * b, "maximum": max(a, b), "minimum": min(a, b)}[operation]
    if not math.isfinite(python):
        return
    assert math.isclose(float(compute(operation, from_float(a), from_float(b))), python, rel_tol=1e-15)


@given(st.integers(-9, 9), st.integers(1, 9))
def test_division_of_integers_is_pythons(a, b):
    assert compute("floor_divide", sympy.Integer(a), sympy.Integer(b)) == a // b
    assert compute("remainder", sympy.Integer(a), sympy.Integer(b)) == a % b


def test_integers_stay_exact_and_fractions_of_positions_stay_calls():
    assert compute("add", I, sympy.Integer(3)) == I + 3
    assert compute("mul", I, 0.5) == Call("mul", (I, 0.5))
    assert compute("exp", -math.inf) == 0


def test_the_logarithm_of_nothing_is_minus_infinity_as_in_torch():
    assert compute("log", sympy.Integer(0)) == -math.inf


@pytest.mark.parametrize(
    ("operation", "leaves"),
    [("div", (sympy.Integer(1), sympy.Integer(0))), ("mul", (math.nan, 2.5)), ("log", (sympy.Integer(-1),))],
)
def test_what_has_no_value_is_not_understood(operation, leaves):
    with pytest.raises(NotUnderstood):
        compute(operation, *leaves)


@given(doubles, doubles)
def test_constants_are_compared_as_in_python(a, b):
    x, y = from_float(a), from_float(b)
    assert at_most(LOGIC, x, y) == (TRUE if a <= b else FALSE)
    assert below(LOGIC, x, y) == (TRUE if a < b else FALSE)
    assert equal(LOGIC, x, y) == (TRUE if a == b else FALSE)


def test_nan_is_neither_less_nor_equal_nor_more():
    for test in (at_most, below, equal):
        assert (
            test(LOGIC, math.nan, I) == test(LOGIC, I, math.nan) == test(LOGIC, math.nan, math.nan) == FALSE
        )


def test_a_fraction_is_compared_as_the_integer_on_its_near_side():
    assert at_most(LOGIC, I, 2.5) == AtMostZero(I - 2)
    assert below(LOGIC, I, 2.5) == AtMostZero(I - 2)
    assert at_most(LOGIC, 2.5, I) == AtMostZero(3 - I)
    assert below(LOGIC, -math.inf, I) == at_most(LOGIC, I, math.inf) == TRUE


@pytest.mark.parametrize(
    ("leaf", "dtype", "fits"),
    [
        (I, torch.bfloat16, False),
        (I, torch.float16, True),
        (I, torch.uint8, False),
        (I, torch.int16, True),
        (I - 1, torch.uint8, False),
        (J, torch.float16, False),
        (J, torch.float32, True),
        (J, torch.int32, True),
        (sympy.Integer(256), torch.uint8, False),
        (sympy.Integer(-1), torch.uint8, False),
        (2.5, torch.int64, False),
        (2.5, torch.float16, True),
        (I, torch.complex64, False),
    ],
)
def test_positions_are_kept_only_by_dtypes_that_hold_them_all(leaf, dtype, fits):
    if fits:
        assert convert(leaf, dtype, BOUNDS) == leaf
        return
    with pytest.raises(NotUnderstood):
        convert(leaf, dtype, BOUNDS)


def test_python_numbers_are_leaves():
    assert [as_leaf(value) for value in (True, 3, 2.0, 2.5)] == [1, 3, 2, 2.5]
    with pytest.raises(NotUnderstood):
        as_leaf("text")
