"""Laws of the one normal form: the formula in its docstring, computed by broadcasting, is what torch computes."""

from dataclasses import dataclass

import pytest
import torch
from graphs import aten_graph, dynamo_graphs, nodes_of
from hypothesis import given
from hypothesis import strategies as st

from attnopt.passes.contraction import contraction, label_down, label_up, other_operand, summed_product
from attnopt.passes.layout import Space
from attnopt.shadow import trace

BADDBMM = torch.ops.aten.baddbmm.default

SIZES = dict(zip("abcdefG", (2, 3, 4, 2, 3, 5, 2), strict=True))
HIDDEN = (2, 3)  # the sizes under an ellipsis


def form_of(function, *inputs):
    """The contraction that the last node of a function is, or None."""
    return contraction(aten_graph(function, *inputs).graph.output_node().args[0])


def spread(x, own, letters):
    """`x` with one dimension per letter, size 1 for those that it lacks."""
    x = x.permute([own.index(a) for a in letters if a in own])
    sizes = iter(x.shape)
    return x.reshape([next(sizes) if a in own else 1 for a in letters])


def evaluate(form, values):
    """The formula of `Contraction` on the inputs of the graph."""
    named = dict(zip((n for n in form.node.graph.nodes if n.op == "placeholder"), values, strict=True))
    letters = list(dict.fromkeys(form.out_letters + form.lhs_letters + form.rhs_letters))
    terms = (
        spread(named[form.lhs], form.lhs_letters, letters),
        spread(named[form.rhs], form.rhs_letters, letters),
    )
    summed = (terms[0] * terms[1]).unsqueeze(-1).flatten(len(form.out_letters)).sum(-1)
    out = form.factor * summed
    return out if form.added is None else out + form.added_factor * named[form.added]


def assert_means(function, *inputs):
    form = form_of(function, *inputs)
    assert form is not None
    got, want = evaluate(form, inputs), function(*inputs)
    assert got.shape == want.shape
    torch.testing.assert_close(got, want)


@dataclass(frozen=True)
class Equation:
    text: str
    left: tuple[int, ...]
    right: tuple[int, ...]


@st.composite
def equations(draw):
    """Each letter is in one operand and kept, or in both and kept or summed; with an ellipsis or without."""
    roles = {a: draw(st.sampled_from(["left", "right", "kept", "summed"])) for a in "abcdG"}
    left, right = (
        draw(st.permutations([a for a, r in roles.items() if r != other])) for other in ("right", "left")
    )
    out = draw(st.permutations([a for a, r in roles.items() if r != "summed"]))
    dots, ranks = draw(st.booleans()), draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    terms = [list(left), list(right), list(out)]
    if dots:
        for term in terms:
            term.insert(draw(st.integers(0, len(term))), "...")
    shapes = [
        tuple(s for a in term for s in (HIDDEN[2 - rank :] if a == "..." else (SIZES[a],)))
        for term, rank in zip(terms, ranks, strict=False)
    ]
    x, y, z = ("".join(term) for term in terms)
    text = draw(st.sampled_from([f"{x},{y}->{z}", f"{x}, {y} -> {z}", f"{x},{y}"]))
    return Equation(text, shapes[0], shapes[1])


@given(equations())
def test_letters_mean_what_einsum_means(equation):
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in (equation.left, equation.right)]
    assert_means(lambda x, y: torch.einsum(equation.text, x, y), *inputs)


def test_an_implied_output_has_the_letters_that_stand_once_in_order():
    form = form_of(lambda x, y: torch.einsum("b...a,G...a", x, y), torch.ones(2, 7, 3), torch.ones(4, 7, 3))
    assert (form.out_letters, form.contracted) == (("dot0", "G", "b"), ("a",))


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("aab,bc->ac", [(2, 2, 3), (3, 4)]),
        ("ab,bcc->ac", [(2, 3), (3, 4, 4)]),
        ("ab,cd->ac", [(2, 3), (4, 5)]),
        ("ab,b->", [(2, 3), (3,)]),
        ("ab->ba", [(2, 3)]),
        ("ab,bc,cd->ad", [(2, 3), (3, 4), (4, 5)]),
    ],
    ids=["repeated left", "repeated right", "summed alone", "summed in one only", "one term", "three terms"],
)
def test_what_is_no_product_summed_over_common_letters_is_refused(text, shapes):
    inputs = [torch.ones(shape) for shape in shapes]
    graph = aten_graph(lambda *x: torch.einsum(text, *x), *inputs)
    (node,) = nodes_of(graph, torch.ops.aten.einsum.default)
    assert contraction(node) is None


@pytest.mark.parametrize(("beta", "alpha"), [(1, 1), (0.5, 3.0), (0, 0.125), (-2, 0)])
def test_alpha_scales_the_product_and_beta_what_is_added(beta, alpha):
    added, x, y = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 5), (2, 3, 4), (2, 4, 5)))
    assert_means(lambda a, b, c: torch.baddbmm(a, b, c, beta=beta, alpha=alpha), added, x, y)
    assert_means(lambda a, b, c: torch.addmm(a, b, c, beta=beta, alpha=alpha), added[0], x[0], y[0])


def test_nothing_is_added_where_beta_is_zero():
    inputs = torch.full((2, 3, 5), torch.nan), torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    assert form_of(lambda a, b, c: torch.baddbmm(a, b, c, beta=0), *inputs).added is None


class Added(torch.nn.Module):
    alpha, beta = 0.3, 2.0

    def forward(self, a, b, c):
        return torch.baddbmm(a, b, c, beta=self.beta, alpha=self.alpha)


class OfSizes(Added):
    def forward(self, a, b, c):
        return torch.baddbmm(a, b, c, beta=self.beta, alpha=b.shape[2] ** -0.5)


def test_factors_that_a_module_holds_are_read_as_they_are_now_and_those_of_sizes_are_not_read():
    inputs = torch.ones(2, 3, 5), torch.ones(2, 3, 4), torch.ones(2, 4, 5)
    (found, unread) = (
        contraction(*nodes_of(trace(*dynamo_graphs(kind(), *inputs, dynamic=True)).module, BADDBMM))
        for kind in (Added, OfSizes)
    )
    assert (found.factor, found.added_factor, unread) == (0.3, 2.0, None)


PRODUCTS = {
    "mm": [(3, 4), (4, 5)],
    "bmm": [(2, 3, 4), (2, 4, 5)],
    "more batches on the left": [(6, 2, 3, 4), (2, 4, 5)],
    "more batches on the right": [(3, 4), (6, 2, 4, 5)],
    "broadcast batches": [(6, 1, 3, 4), (1, 2, 4, 5)],
}


@pytest.mark.parametrize("name", sorted(PRODUCTS))
def test_matmul_multiplies_the_last_two_dimensions(name):
    assert_means(torch.matmul, *(torch.randn(shape, dtype=torch.float64) for shape in PRODUCTS[name]))


def test_a_vector_that_is_an_input_is_no_operand():
    assert form_of(torch.matmul, torch.ones(2, 3), torch.ones(3)) is None
    assert form_of(lambda x, y: torch.matmul(x, y.exp()), torch.ones(2, 3), torch.ones(3)) is not None


def test_a_layer_is_no_product_but_one_with_a_computed_tensor_is():
    inputs = torch.ones(2, 5, 3), torch.ones(4, 3)
    assert form_of(torch.nn.functional.linear, *inputs) is None
    assert form_of(lambda x, w: torch.nn.functional.linear(x, w.view(4, 3).clone()), *inputs) is None
    form = form_of(lambda x, w: torch.nn.functional.linear(x, w.exp()), *inputs)
    assert (form.out_letters, form.contracted) == (("l0", "l1", "n"), ("c",))


OTHER_PRODUCTS = {
    "inner": (torch.inner, (2, 3, 4), (5, 4)),
    "tensordot": (lambda x, y: torch.tensordot(x, y, dims=([2, 0], [0, 1])), (2, 3, 4), (4, 2, 5)),
    "vecdot": (torch.linalg.vecdot, (2, 3, 1, 4), (2, 1, 5, 4)),
    "vecdot along another dimension": (lambda x, y: torch.linalg.vecdot(x, y, dim=1), (2, 4, 5), (2, 4, 5)),
    "out": (lambda x, y: torch.bmm(x, y, out=torch.empty(2, 3, 5, dtype=x.dtype)), (2, 3, 4), (2, 4, 5)),
}


@pytest.mark.parametrize("name", sorted(OTHER_PRODUCTS))
def test_other_products_mean_what_torch_computes(name):
    function, left, right = OTHER_PRODUCTS[name]
    assert_means(function, *(torch.randn(shape, dtype=torch.float64) for shape in (left, right)))


@pytest.mark.parametrize(
    ("function", "is_product"),
    [
        (lambda x, y: (x[:, :, None] * y[:, None]).sum(-1), True),
        (lambda x, y: (x[:, :, None] * y[:, None]).sum((-1, 0)), True),
        (lambda x, y: (x[:, :, None] * y[:, None]).sum(-1, keepdim=True), False),
        (lambda x, y: (x[:, :, None] + y[:, None]).sum(-1), False),
        (lambda x, y: (x[:, :, None] * y[:, None]).sum(), False),
    ],
)
def test_a_product_by_broadcasting_is_one_where_dimensions_vanish(function, is_product):
    inputs = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    node = aten_graph(function, *inputs).graph.output_node().args[0]
    assert (summed_product(node) is not None) is is_product


def test_labels_agree_upwards_and_downwards():
    form = form_of(torch.matmul, torch.ones(6, 1, 3, 4), torch.ones(2, 4, 5))
    space = Space()
    out = tuple(space.fresh(size) for size in (6, 2, 3, 5))
    lhs, rhs = label_up(space, form, out)
    assert (lhs[:3], rhs[0], rhs[2]) == ((out[0], (), out[2]), out[1], out[3])
    assert lhs[3] == rhs[1] != ()
    other, result = label_down(space, form, form.rhs, rhs)
    assert other_operand(form, form.rhs) is form.lhs
    assert (other[3], result[1], result[3]) == (lhs[3], out[1], out[3])
    assert [a.size for axes in other for a in axes] == [6, 3, 4]
