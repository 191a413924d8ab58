"""Laws of named dimensions: a label names the same element on both sides of a view, or the view is refused."""

from itertools import pairwise
from math import prod

import pytest
import sympy
import torch
from graphs import aten_graph, nodes_of
from hypothesis import given
from hypothesis import strategies as st

from attnopt.passes.layout import Space, is_copy, permutation, regroup, step_down, step_up
from attnopt.rule import Reject

aten = torch.ops.aten


def elements(shape):
    """A tensor whose elements are all different."""
    return torch.arange(prod(shape), dtype=torch.float32).view(shape)


def labelled(space, dims, leaves, x):
    """`x` with one dimension per leaf, in the order of `leaves`; size 1 for those that it lacks."""
    own = [a for axes in space.resolve(dims) for a in axes]
    assert [prod(a.size for a in axes) for axes in space.resolve(dims)] == list(x.shape)
    x = x.reshape([a.size for a in own]).permute([own.index(a) for a in leaves if a in own])
    return x.reshape([a.size if a in own else 1 for a in leaves])


def assert_labels_name_the_same_elements(space, above, below):
    """above, below: (dims, tensor) of the input of some views, and of what came out."""
    leaves = [a for axes in space.resolve(below[0]) for a in axes]
    out = labelled(space, *(below[0], leaves, below[1]))
    source = labelled(space, *(above[0], leaves, above[1]))
    assert torch.equal(out, source.expand_as(out))


def climb(function, x):
    """From a fresh label for each dimension of function(x) up to x: the space and both ends."""
    node, out = aten_graph(function, x).graph.output_node().args[0], function(x)
    space = Space()
    below = dims = tuple(space.fresh(size) for size in out.shape)
    while node.op != "placeholder":
        step = step_up(space, node, dims)
        assert step is not None, node.target
        node, dims = step
    return space, dims, below, out


#: Each takes a tensor, a dimension of it and another one; sizes are powers of 2 throughout, so every cut is whole.
VIEWS = {
    "transpose": lambda x, a, b: x.transpose(a, b),
    "permute": lambda x, a, b: x.permute(*range(a, x.dim()), *range(a)),
    "movedim": lambda x, a, b: x.movedim(a, b),
    "unsqueeze and expand": lambda x, a, b: x.unsqueeze(a).expand(*x.shape[:a], 2, *x.shape[a:]),
    "expand in front": lambda x, a, b: x.expand(2, *x.shape),
    "repeat": lambda x, a, b: x.repeat(*[2 if d == a else 1 for d in range(x.dim())]),
    "repeat in front": lambda x, a, b: x.repeat(2, *[1] * x.dim()),
    "repeat_interleave": lambda x, a, b: x.repeat_interleave(2, dim=a),
    "split": lambda x, a, b: x.unflatten(a, (-1, min(2, x.shape[a]))),
    "merge": lambda x, a, b: x.flatten(min(a, b), max(a, b)),
    "clone": lambda x, a, b: x.clone(),
}
STEPS = st.lists(st.tuples(st.sampled_from(sorted(VIEWS)), st.integers(0, 5), st.integers(0, 5)), max_size=5)
SHAPES = st.lists(st.sampled_from([1, 2, 4]), min_size=2, max_size=3)


def chain(steps):
    def views(x):
        for name, a, b in steps:
            x = VIEWS[name](x, a % x.dim(), b % x.dim())
        return x

    return views


@given(SHAPES, STEPS.filter(bool))
def test_going_up_a_chain_of_views_keeps_each_element_its_label(shape, steps):
    x = elements(shape)
    space, above, below, out = climb(chain(steps), x)
    assert_labels_name_the_same_elements(space, (above, x), (below, out))


DOWN = ("clone", "merge", "movedim", "permute", "split", "transpose")


@given(SHAPES, STEPS.map(lambda steps: [s for s in steps if s[0] in DOWN]).filter(bool))
def test_going_down_a_chain_of_views_keeps_each_element_its_label(shape, steps):
    x = elements(shape)
    space = Space()
    above = dims = tuple(space.fresh(size) for size in shape)
    for node in aten_graph(chain(steps), x).graph.nodes:
        if node.op == "call_function":
            dims = step_down(space, node, dims)
            assert dims is not None, node.target
    assert_labels_name_the_same_elements(space, (above, x), (dims, chain(steps)(x)))


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_each_view_alone_is_inverted(name):
    x = elements((2, 4, 2))
    for a, b in pairwise((0, 1, 2, 0)):
        space, above, below, out = climb(chain([(name, a, b)]), x)
        assert_labels_name_the_same_elements(space, (above, x), (below, out))


def view_node():
    (node,) = nodes_of(aten_graph(lambda x: x.view(6, 4), torch.empty(24)), aten.view.default)
    return node


def test_regroup_splits_an_axis_where_a_view_cuts_it_and_all_tensors_learn_of_it():
    space = Space()
    (axis,) = old = space.fresh(12)
    (major,), (minor,) = regroup(space, old, (3, 4), view_node())
    assert (major.size, minor.size) == (3, 4)
    assert space.leaves((axis,)) == (major, minor)
    assert regroup(space, old, (12,), view_node()) == ((major, minor),)


def test_a_dimension_of_size_one_has_no_axis():
    space = Space()
    axes = space.fresh(5)
    assert space.fresh(1) == ()
    assert regroup(space, axes, (1, 5, 1), view_node()) == ((), axes, ())


@pytest.mark.parametrize("sizes", [(6, 4), (3, 8), (4,), (24, 2)])
def test_a_view_that_mixes_dimensions_is_refused(sizes):
    space = Space()
    with pytest.raises(Reject, match=r"whole dimensions|cuts a dimension"):
        regroup(space, space.fresh(4) + space.fresh(6), sizes, view_node())


ORDERS = {
    "t": lambda x: x[0].t(),
    "T": lambda x: x[0].T,
    "mT": lambda x: x.mT,
    "swapaxes": lambda x: x.swapaxes(-1, 0),
    "movedim of two": lambda x: x.movedim((0, 1), (2, 0)),
    "moveaxis": lambda x: x.moveaxis(2, 0),
    "permute from the end": lambda x: x.permute(-1, 0, 1),
}


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_a_permutation_says_where_each_dimension_came_from(name):
    x = elements((2, 3, 5))
    *_, node = (n for n in aten_graph(ORDERS[name], x).graph.nodes if n.op == "call_function")
    order = permutation(node)
    assert order is not None
    held = x[0] if len(order) == 2 else x
    assert torch.equal(ORDERS[name](x), held.permute(order))


@pytest.mark.parametrize(
    ("function", "same"),
    [
        (lambda x: x.to(torch.float32, copy=True), True),
        (lambda x: x.to(torch.float64), False),
        (lambda x: torch.dropout(x, 0.5, train=False), True),
        (lambda x: torch.dropout(x, 0.5, train=True), False),
        (lambda x: x.repeat(1, 1), True),
        (lambda x: x.repeat(1, 2), False),
    ],
)
def test_only_what_changes_no_element_is_a_copy(function, same):
    *_, node = (n for n in aten_graph(function, elements((2, 3))).graph.nodes if n.op == "call_function")
    assert is_copy(node) is same


def test_what_sizes_do_not_tell_the_number_of_elements_does():
    n = sympy.Symbol("n", positive=True, integer=True)
    space = Space()
    whole, last = space.fresh(n), space.fresh(7)
    cut, rest, kept = regroup(space, whole + last, (sympy.floor(n / 3), sympy.floor(n / 5), 7), view_node())
    assert space.leaves(whole) == cut + rest
    assert kept == last
    assert regroup(space, cut + rest + last, (n, 1, 7), view_node()) == (cut + rest, (), last)
    with pytest.raises(Reject, match="size does not tell"):
        regroup(space, space.fresh(n) + space.fresh(n + 1), (sympy.floor(n / 3), 5, n), view_node())
