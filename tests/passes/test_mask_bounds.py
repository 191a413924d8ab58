"""Laws of bounds: they hold at every position and size, and symbolic sizes do not make them useless."""

import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from mask_trace import inputs_of, results, trace
from torch.utils._sympy.functions import FloorDiv, PythonMod

from attnopt.passes.mask_bounds import POSITIONS, Bounds, bounds_for, integer_of
from attnopt.passes.sizes import shape_of

SQ, SK = (sympy.Symbol(name, integer=True, positive=True) for name in ("sq", "sk"))
I, J = POSITIONS["i"], POSITIONS["j"]
SYMBOLIC = Bounds({I: SQ, J: SK})

terms = st.sampled_from(
    [I, J, SQ, SK, I * J, sympy.Abs(I - J), FloorDiv(I, 3), PythonMod(I - J, 4), sympy.Max(I, J), SQ * SK]
)
expressions = st.lists(st.tuples(st.integers(-3, 3), terms), max_size=4).map(
    lambda parts: sympy.expand(sum((n * term for n, term in parts), start=sympy.Integer(0)))
)


@given(expressions, st.integers(-5, 5), st.integers(1, 6), st.integers(1, 6), st.data())
def test_no_position_exceeds_the_bounds(expr, constant, sq, sk, data):
    expr = expr + constant
    i, j = data.draw(st.integers(0, sq - 1)), data.draw(st.integers(0, sk - 1))
    fixed = Bounds({I: sympy.Integer(sq), J: sympy.Integer(sk)})
    at_sizes = expr.subs({SQ: sq, SK: sk})
    value = at_sizes.subs({I: i, J: j})
    assert SYMBOLIC.lower(expr) <= value <= SYMBOLIC.upper(expr)
    assert fixed.lower(at_sizes) <= value <= fixed.upper(at_sizes)


def test_linear_bounds_are_met():
    fixed = Bounds({I: sympy.Integer(5), J: sympy.Integer(7)})
    assert (fixed.lower(2 * I - J + 1), fixed.upper(2 * I - J + 1)) == (-5, 9)


def test_positions_stay_below_their_size_whatever_it_is():
    assert SYMBOLIC.always_at_most_zero(I - SQ + 1)
    assert not SYMBOLIC.always_at_most_zero(I - SQ + 2)
    assert not SYMBOLIC.always_at_most_zero(I - SK)


def test_a_position_can_be_added():
    t = sympy.Symbol("t", integer=True, nonnegative=True)
    assert SYMBOLIC.with_position(t, 4).upper(t - I) == 3


def test_sizes_that_a_graph_was_traced_for_are_at_least_two():
    module = trace(lambda x: x.bool(), torch.ones(4, 5), dynamic=True)
    rows, columns = shape_of(inputs_of(module)[0])
    bounds = bounds_for(results(module)[0], {"b": 1, "h": 1, "i": rows, "j": columns})
    assert bounds.always_at_most_zero(2 - rows)
    assert not bounds.always_at_most_zero(3 - rows)


def test_integers_are_ints_and_symbolic_ints_and_nodes_that_hold_them():
    module = trace(lambda x: torch.arange(x.shape[0]), torch.ones(4, 5), dynamic=True)
    size = next(n for n in module.graph.nodes if "sym_size" in n.name)
    symbol = shape_of(inputs_of(module)[0])[0]
    assert [integer_of(size), integer_of(size.meta["val"]), integer_of(3)] == [symbol, symbol, 3]
    assert [integer_of(value) for value in (True, 1.0, None, results(module)[0])] == [None] * 4
