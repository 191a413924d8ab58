"""Laws of symbolic sizes: what is said of them holds for all values, and no guard is installed."""

import pytest
import sympy
import torch
from graphs import aten_graph
from hypothesis import given
from hypothesis import strategies as st

from attnopt.passes.sizes import Concrete, divide, hint, is_one, product, same, shape_of, size_of

S, T = sympy.symbols("s t", integer=True, positive=True)
NUMBERS = st.integers(1, 60)
SIZES = st.builds(
    lambda n, powers: product((n, S ** powers[0], T ** powers[1])),
    NUMBERS,
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
)


def at(size, s, t):
    return int(sympy.sympify(size).subs({S: s, T: t}))


@given(SIZES, SIZES, NUMBERS, NUMBERS)
def test_a_quotient_is_whole_for_all_values(a, b, s, t):
    quotient = divide(a, b)
    if quotient is not None:
        assert at(quotient, s, t) * at(b, s, t) == at(a, s, t)
    assert same(divide(product((a, b)), b), a)


@pytest.mark.parametrize(("a", "b"), [(7, 2), (4, 0), (S, 2), (S, T), (3 * S, 2), (S + 1, S)])
def test_what_may_not_be_whole_is_not_divided(a, b):
    assert divide(a, b) is None


def test_a_whole_number_that_remains_is_an_int():
    assert divide(6 * S * T, 2 * S * T) == 3
    assert type(divide(6 * S * T, 2 * S * T)) is int


def test_sizes_are_the_same_only_for_certain():
    assert same(2 * (S + 1), 2 * S + 2)
    assert same(4, 4)
    assert not same(S, T)
    assert not same(S, 4)
    assert not same(3, 4)


def test_one_is_one_for_certain():
    assert is_one(1)
    assert not is_one(S)
    assert product(()) == 1


def test_the_shape_of_a_symbolic_node_costs_no_guard():
    graph = aten_graph(lambda x: x.flatten(0, 1), torch.ones(6, 5, 4), dynamic=True)
    (x,) = graph.graph.find_nodes(op="placeholder")
    a, b, _ = x.meta["val"].shape
    out = graph.graph.output_node().args[0]
    before = len(a.node.shape_env.guards)
    shape = shape_of(out)
    assert same(shape[0], product((size_of(a), size_of(b))))
    assert not same(*shape)
    assert len(a.node.shape_env.guards) == before


def test_a_hint_is_a_plausible_number():
    graph = aten_graph(lambda x: x * 1, torch.ones(6, 4), dynamic=True)
    (x,) = graph.graph.find_nodes(op="placeholder")
    assert [hint(size) for size in x.meta["val"].shape] == [6, 4]
    assert hint(9) == 9


def test_concrete_sizes_keep_each_symbol_its_own_odd_number():
    concrete = Concrete(literals={4096: 16})
    s, t = concrete.of(S), concrete.of(T)
    assert s != t
    assert {s % 2, t % 2} == {1}
    assert concrete.of(2 * S + T) == 2 * s + t
    assert concrete.of(S) == s
    assert [concrete.of(4096), concrete.of(7)] == [16, 7]
