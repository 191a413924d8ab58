"""Ranges of numbers: they hold every value that the number takes at some position."""

import math

import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from attnopt.passes.linear_range import range_of
from attnopt.passes.mask_bounds import POSITIONS, Bounds
from attnopt.passes.mask_formula import Call, Number

HEAD = POSITIONS["h"]
COUNT = 5
BOUNDS = Bounds({HEAD: sympy.Integer(COUNT)})
OPERATIONS = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "neg": lambda a: -a,
    "exp": math.exp,
    "log": math.log,
}


def numbers() -> st.SearchStrategy[Number]:
    leaves = st.one_of(st.just(HEAD), st.floats(-2, 2).filter(lambda x: not x.is_integer()))
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(
                lambda op, a, b: Call(op, (a, b)), st.sampled_from(["add", "sub", "mul"]), inner, inner
            ),
            st.builds(lambda op, a: Call(op, (a,)), st.sampled_from(["neg", "exp", "log"]), inner),
        ),
        max_leaves=6,
    )


def value(number: Number, head: int) -> float:
    match number:
        case Call(op, args):
            return OPERATIONS[op](*(value(x, head) for x in args))
        case sympy.Expr():
            return float(number.subs(HEAD, head))
    return float(number)


@given(numbers(), st.integers(0, COUNT - 1))
def test_a_range_holds_every_value(number: Number, head: int) -> None:
    low, high = range_of(number, BOUNDS)
    try:
        held = value(number, head)
    except (ValueError, OverflowError):
        return
    slack = 1e-9 * max(1.0, abs(held))
    assert low - slack <= held <= high + slack


def test_the_decays_of_retention_are_negative() -> None:
    rates = Call("log", (Call("sub", (1.0, Call("pow", (2.0, Call("sub", (-5.0, HEAD)))))),))
    assert range_of(rates, BOUNDS)[1] < 0


@pytest.mark.parametrize("number", [Call("log", (-1.0,)), Call("pow", (-0.5, HEAD)), Call("sin", (HEAD,))])
def test_what_is_not_known_may_be_anything(number: Number) -> None:
    assert range_of(number, BOUNDS) == (-math.inf, math.inf)
