"""Laws of symbolic sizes: what is said of them holds for all values, and no guard is installed."""

import math

import pytest
import sympy
import torch
from graphs import aten_graph, dynamo_graphs
from hypothesis import given
from hypothesis import strategies as st

from attnopt.passes.sizes import (
    Concrete,
    divide,
    hint,
    is_float_input,
    is_one,
    is_positive,
    product,
    same,
    seen_float,
    shape_of,
    size_of,
)

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


def numbers_in(function, *inputs):
    """The values of the nodes of a function's graph that are no tensors, by how Python writes them."""
    (module,) = dynamo_graphs(function, *inputs, dynamic=True)
    values = [node.meta.get("example_value") for node in module.graph.nodes]
    return [value for value in values if isinstance(value, torch.SymInt | torch.SymFloat)]


def test_a_number_made_of_lengths_is_positive_for_certain():
    def scaled(x, n):
        d, rows = x.shape[-1], x.shape[-2]
        return x * d**-0.5 + x / math.sqrt(d) + x * (rows / d) + x * (rows - d) + x * (1 / n)

    found = numbers_in(scaled, torch.ones(5, 7), -4)
    assert {is_positive(value) for value in found if value.node.hint <= 0} == {False}
    certain = {value.node.hint for value in found if is_positive(value)}
    assert certain == {5, 7, 7**-0.5, 7**0.5, 5 / 7}


class Scaled(torch.nn.Module):
    factor = 0.3

    def forward(self, x):
        return x * self.factor * (self.factor * x.shape[0]) * (2 * self.factor) / x.shape[0] ** 0.5


def test_only_what_is_made_of_floats_alone_is_a_float_from_outside():
    found = [value for value in numbers_in(Scaled(), torch.ones(5, 4)) if isinstance(value, torch.SymFloat)]
    assert {float(value.node.hint) for value in found if is_float_input(value)} == {0.3, 0.6}
    assert [seen_float(value) is not None for value in found] == [is_float_input(value) for value in found]
    assert not any(is_positive(value) for value in found if is_float_input(value))
    env = found[0].node.shape_env
    assert not [guard for guard in env.guards if "0.3" in str(guard.expr)]


def test_a_symbolic_number_has_no_dimensions():
    (module,) = dynamo_graphs(Scaled(), torch.ones(5, 4), dynamic=True)
    item = next(n for n in module.graph.nodes if isinstance(n.meta.get("example_value"), torch.SymFloat))
    item.meta["val"] = item.meta["example_value"]
    assert shape_of(item) == ()


def test_concrete_numbers_follow_from_the_sizes():
    found = numbers_in(Scaled(), torch.ones(5, 4))
    concrete = Concrete()
    length = concrete.number(next(value for value in found if isinstance(value, torch.SymInt)))
    floats = {concrete.number(value) for value in found if isinstance(value, torch.SymFloat)}
    assert sorted(floats) == pytest.approx([0.3, 0.6, 0.3 * length, length**0.5])


def test_what_a_guard_leaves_one_value_is_a_number():
    def halves(x):
        if x.shape[0] // 2 != 1:
            return x
        return torch.zeros(x.shape[0] // 2, x.shape[1]) + x.sum()

    (module,) = dynamo_graphs(halves, torch.ones(3, 4), dynamic=True)
    (zeros,) = module.graph.find_nodes(op="call_function", target=torch.zeros)
    rows, columns = zeros.meta["example_value"].shape
    assert isinstance(rows, torch.SymInt)
    assert not rows.node.expr.is_number
    assert size_of(rows) == 1
    assert not isinstance(size_of(columns), int)
