"""Laws of interpretation: indices broadcast as shapes do, dtypes convert as they do, the rest is data."""

import pytest
import sympy
import torch
from mask_trace import inputs_of, interpret, results, trace

from attnopt.passes.mask_bounds import POSITIONS
from attnopt.passes.mask_formula import FALSE, TRUE, AtMostZero, Data, Fact, NotUnderstood, always
from attnopt.passes.mask_reader import MAX_DEPTH, as_condition, as_numbers, broadcast, index_of
from attnopt.passes.mask_rules import reader_for

B, H, I, J = (POSITIONS[role] for role in ("b", "h", "i", "j"))
SIZES = {"b": 2, "h": 3, "i": 4, "j": 5}
ZERO, ONE = sympy.Integer(0), sympy.Integer(1)


def element(make, *inputs, roles=("i", "j"), dynamic=False):
    (node,) = results(trace(make, *inputs, dynamic=dynamic))
    return node, reader_for(node, SIZES).element(node, index_of(roles))


def test_indices_broadcast_as_shapes_do():
    shape = (2, 3, 4, 5)
    assert broadcast((B, H, I, J), shape, shape) == (B, H, I, J)
    assert broadcast((B, H, I, J), shape, (3, 1, 5)) == (H, ZERO, J)
    assert broadcast((B, H, I, J), shape, ()) == ()
    assert broadcast((B, I), (1, 4), (1, 4)) == (B, I)


@pytest.mark.parametrize("source", [(4, 4), (2, 3, 4, 5, 6)])
def test_shapes_that_do_not_broadcast_are_not_understood(source):
    with pytest.raises(NotUnderstood):
        broadcast((B, H, I, J), (2, 3, 4, 5), source)


def test_dimensions_without_role_have_one_element():
    assert index_of(("b", None, "j")) == (B, ZERO, J)


def test_conditions_are_zero_and_one_and_numbers_hold_where_they_are_not_zero():
    logic = reader_for(results(trace(lambda: torch.zeros(1)))[0], SIZES).logic
    line = AtMostZero(J - I)
    assert as_numbers(logic, line) == {ONE: line, ZERO: AtMostZero(I - J + 1)}
    assert as_condition(logic, as_numbers(logic, line)) == line
    assert [as_condition(logic, always(leaf)) for leaf in (ZERO, ONE, 0.5, -2.5)] == [FALSE, TRUE, TRUE, TRUE]
    with pytest.raises(NotUnderstood):
        as_condition(logic, always(Data("node", ())))


def test_inputs_are_data_and_boolean_inputs_facts():
    node, value = element(lambda x: x.clone(), torch.ones(4, 5))
    source = node.args[0]
    assert value == always(Data(source, (I, J)))
    node, value = element(lambda x: x[:, :5], torch.ones(4, 9, dtype=torch.bool))
    assert isinstance(value, Fact)
    assert value.data.index == (I, J)


def test_an_input_named_like_an_operation_is_an_input():
    module = trace(lambda tril: tril * 1, torch.ones(4, 5))
    (tril,) = inputs_of(module)
    tril.target = "tril"
    assert reader_for(tril, SIZES).element(tril, (I, J)) == always(Data(tril, (I, J)))


def test_chains_longer_than_any_mask_are_data():
    def chain(length):
        def make(x):
            for _ in range(length):
                x = x.clone()
            return x

        return make

    short, long = (element(chain(n), torch.ones(4, 5)) for n in (MAX_DEPTH - 1, MAX_DEPTH + 5))
    assert short[1] == always(Data(short[0].graph.find_nodes(op="placeholder")[0], (I, J)))
    (leaf,) = long[1]
    assert leaf.node.op == "call_function"


def test_each_element_is_interpreted_once():
    (node,) = results(trace(lambda: torch.ones(4, 5).tril() * torch.ones(4, 5).tril()))
    reader = reader_for(node, SIZES)
    first = reader.element(node, (I, J))
    assert reader.element(node, (I, J)) is first
    assert len(reader.seen) == len([n for n in node.graph.nodes if n.op == "call_function"])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_of_a_cache_is_understood_at_any_size(dynamic):
    def after_a_cache(q, k):
        past = k.shape[0] - q.shape[0]
        return torch.arange(k.shape[0])[None, :] <= torch.arange(past, k.shape[0])[:, None]

    seen = interpret(after_a_cache, torch.ones(4), torch.ones(7), dynamic=dynamic)
    assert torch.equal(seen.claimed, seen.actual)
    assert not seen.reads_data
