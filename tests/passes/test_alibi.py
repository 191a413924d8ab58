"""Biases that are linear in the distance are proven, however spelled; what only looks like one stays a tensor."""

from itertools import product

import pytest
import torch
from alibi_spellings import NEAR_MISSES, SCALE, SPELLINGS, Function, attend, causal, distance, inputs
from compiling import check_like_eager, compiled, reports_after
from graphs import rewritten, site_of
from torch import Tensor, nn
from torch.nn import functional

import attnopt
from attnopt.mask import CAUSAL, FULL
from attnopt.passes.alibi_terms import steady_terms
from attnopt.passes.mask_algebra import KEY, QUERY
from attnopt.passes.mask_formula import Call, NotUnderstood
from attnopt.spec import Alibi, EmptyRow

KERNELS = ("streaming", "sdpa")


@pytest.mark.parametrize("function", SPELLINGS, ids=lambda f: f.__name__)
def test_the_line_is_proven_whatever_its_spelling(function: Function) -> None:
    mask, alibi = SPELLINGS[function]
    for dynamic in (False, True):
        spec = site_of(function, *inputs(), dynamic=dynamic).spec
        assert (spec.mask, spec.alibi, spec.bias) == (mask, alibi, ()), dynamic


@pytest.mark.parametrize(
    ("place", "function"), list(enumerate(SPELLINGS)), ids=lambda x: getattr(x, "__name__", "")
)
def test_output_and_gradients_are_eagers(place: int, function: Function) -> None:
    """With one kernel after the other: which spelling it was, none can tell."""
    deny = (KERNELS[place % len(KERNELS)],)
    (site,) = check_like_eager(function, inputs(), differentiable=3, deny=deny).attention
    assert site.verdict in ("rewritten", "kept"), site.reason


@pytest.mark.parametrize("function", list(SPELLINGS)[2:5], ids=lambda f: f.__name__)
def test_output_and_gradients_are_eagers_for_symbolic_sizes(function: Function) -> None:
    (site,) = check_like_eager(function, inputs(), differentiable=3, dynamic=True).attention
    assert site.verdict in ("rewritten", "kept"), site.reason


@pytest.mark.parametrize("function", NEAR_MISSES, ids=lambda f: f.__name__)
def test_a_near_miss_stays_a_tensor_and_is_computed_right(function: Function) -> None:
    assert site_of(function, *inputs(sq=300, sk=300)).spec.alibi is None
    check_like_eager(function, inputs(), differentiable=3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_slopes_that_are_trained_get_their_gradient(kernel: str) -> None:
    function = next(f for f in SPELLINGS if f.__name__ == "slope_times_distance")
    deny = tuple(other for other in KERNELS if other != kernel)
    (site,) = check_like_eager(function, inputs(), differentiable=4, deny=deny).attention
    assert (site.verdict, site.kernel) == ("rewritten", kernel)


class Attention(nn.Module):
    """Slopes as the module holds them: a buffer, or a parameter."""

    def __init__(self, slopes: Tensor) -> None:
        super().__init__()
        if isinstance(slopes, nn.Parameter):
            self.slopes = slopes
        else:
            self.register_buffer("slopes", slopes)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, self.slopes.view(-1, 1, 1) * distance(q.shape[2], k.shape[2]))


def test_slopes_may_be_a_buffer_and_change() -> None:
    module = Attention(inputs()[3])
    run, held = compiled(module), inputs()[:3]
    before = attnopt.reports()
    run(*held)
    assert [site.spec for site in reports_after(before).attention] == ["softmax scale=0.25 causal alibi"]
    for change in (lambda x: x.mul_(3), lambda x: x.copy_(torch.rand(4))):
        change(module.slopes)
        torch.testing.assert_close(run(*held), module(*held), rtol=1e-4, atol=1e-5)


def test_slopes_may_be_a_parameter() -> None:
    module = Attention(nn.Parameter(inputs()[3]))
    run, held = compiled(module), inputs()[:3]
    gradients = [torch.autograd.grad(f(*held).square().sum(), module.slopes)[0] for f in (run, module)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_a_single_query_continues_the_sequence() -> None:
    function = next(f for f in SPELLINGS if f.__name__ == "slope_times_position")
    spec = site_of(function, *inputs(sq=1)).spec
    assert spec.alibi is not None
    check_like_eager(function, inputs(sq=1), differentiable=3)


@pytest.mark.parametrize("deny", [(), ("streaming",)], ids=["streaming", "sdpa"])
def test_every_pair_of_lengths_counts_from_where_the_graph_does(deny: tuple[str, ...]) -> None:
    names = ("slope_times_distance", "slope_times_position", "magnitude_shifted")
    lengths = [(1, 1), (1, 4), (2, 5), (3, 3), (4, 7), (5, 2)]
    for function, (sq, sk) in product([f for f in SPELLINGS if f.__name__ in names], lengths):
        held = [x.double() for x in inputs(sq=sq, sk=sk)]
        got = rewritten(function, *held, deny=deny)(*held)
        torch.testing.assert_close(got, function(*held), rtol=1e-9, atol=1e-12, equal_nan=True)


def test_the_library_builds_the_bias_for_symbolic_sizes() -> None:
    function = next(f for f in SPELLINGS if f.__name__ == "slope_times_distance")
    (site,) = check_like_eager(
        function, inputs(), differentiable=3, dynamic=True, deny=("streaming",)
    ).attention
    assert (site.verdict, site.kernel) == ("rewritten", "sdpa")


@pytest.mark.parametrize("slope", [torch.tensor(0.3), 0.3], ids=["tensor", "number"])
def test_a_single_head_has_one_slope(slope: Tensor | float) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        away = distance(q.shape[1], k.shape[1])
        return attend(q, k, v, slope * away, away > 0)

    q, k, v = (x[:, 0] for x in inputs()[:3])
    (site,) = check_like_eager(function, [q, k, v], differentiable=3).attention
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=0.25 causal alibi")


def test_grouped_heads_have_slopes_of_their_own() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
        return attend(q, k, v, slopes[:, None, None] * distance(q.shape[2], k.shape[2]))

    q, k, v, slopes = inputs()
    spec = site_of(function, q, k[:, :2], v[:, :2], slopes).spec
    assert (spec.alibi, spec.heads.share) == (Alibi(), 2)
    check_like_eager(function, [q, k[:, :2], v[:, :2], slopes], differentiable=3)


# ---- what a row shift would change ----


def sinks_beside(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, sinks: Tensor) -> Tensor:
    scores = (q @ k.mT * SCALE + bias).masked_fill(~causal(q, k), -torch.inf)
    column = sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ v


def test_beside_a_sink_only_the_exact_line_is_one() -> None:
    def exact(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
        return sinks_beside(q, k, v, slopes[:, None, None] * (distance(q.shape[2], k.shape[2]) - 2), sinks)

    def shifted(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, sinks: Tensor) -> Tensor:
        return sinks_beside(q, k, v, slopes[:, None, None] * torch.arange(k.shape[2]), sinks)

    held = [*inputs(), torch.randn(4)]
    assert str(site_of(exact, *held).spec.alibi) == "alibi(2)"
    assert site_of(shifted, *held).spec.alibi is None
    for function in (exact, shifted):
        check_like_eager(function, held, differentiable=3)


def test_rows_that_padding_empties_are_what_the_graph_makes_of_them() -> None:
    def filled_last(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, keep: Tensor) -> Tensor:
        scores = q @ k.mT * SCALE + slopes[:, None, None] * torch.arange(k.shape[2])
        hidden = ~(causal(q, k) & keep[:, None, None])
        return functional.softmax(scores.masked_fill(hidden, torch.finfo(q.dtype).min), -1) @ v

    def line_last(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, keep: Tensor) -> Tensor:
        hidden = ~(causal(q, k) & keep[:, None, None])
        scores = (q @ k.mT * SCALE).masked_fill(hidden, -1e9)
        return functional.softmax(scores + slopes[:, None, None] * torch.arange(k.shape[2]), -1) @ v

    keep = torch.ones(2, 13, dtype=torch.bool)
    keep[1, :5] = False
    spec = site_of(filled_last, *inputs(), keep).spec
    assert (spec.alibi, spec.empty_row) == (Alibi(), EmptyRow.UNIFORM)
    check_like_eager(filled_last, [*inputs(), keep], differentiable=3)
    check_like_eager(line_last, [*inputs(), keep])


def test_a_kernel_may_read_the_tensor_that_the_graph_has() -> None:
    function = next(f for f in SPELLINGS if f.__name__ == "magnitude")
    site = site_of(function, *inputs())
    assert site.spec.mask == FULL
    assert [other.spec.bias for other in site.otherwise] == [("bias",)]
    assert all("slopes" not in other.operands and other.spec.alibi is None for other in site.otherwise)


# ---- positions of any size ----


def test_distances_are_whole_numbers_however_far() -> None:
    """fp32 holds slope * j to 2^-24 of it: at j = 4,000,000 a tenth of a logit; of the distance nothing is lost."""
    alibi, slopes = Alibi(), torch.tensor([0.7])
    near = alibi.dense(slopes, 1, 1 << 22)  # the last query, were it the first
    far = (slopes * torch.arange(1 << 22, dtype=torch.float32))[-3:]
    last = Alibi(CAUSAL.offset).dense(slopes, 3, 3)[0, 0, 2]
    assert torch.equal(near[0, 0, 0, -3:], far)
    assert torch.equal(last, slopes * torch.tensor([-2.0, -1.0, 0.0]))


def test_sums_of_products_are_taken_apart() -> None:
    slope = Call("exp", (0.5,))
    product = Call("mul", (slope, KEY - QUERY))
    assert steady_terms(Call("neg", (product,))) == {slope: QUERY - KEY}
    assert steady_terms(Call("sub", (product, Call("mul", (KEY, slope))))) == {slope: -QUERY}
    assert steady_terms(Call("div", (product, 4.0))) == {Call("mul", (0.25, slope)): KEY - QUERY}
    with pytest.raises(NotUnderstood):
        steady_terms(Call("exp", (KEY,)))
