"""Between Q K^T and the softmax: scales, casts, caps and masks in any order that has one meaning."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import found_in, reject_of, site_of
from torch import Tensor

from attnopt.mask import Causal
from attnopt.passes.site import Operand

Q, K, V = torch.randn(3, 2, 3, 7, 4).unbind()
BIAS = torch.randn(7, 7)


def attention(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Softmax attention with `change`, which may take further inputs, between the product and the softmax."""
    return lambda q, k, v, *more: change(q @ k.transpose(-2, -1), *more).softmax(-1) @ v


def hidden(scores: Tensor) -> Tensor:
    return scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)


def capped(scores: Tensor) -> Tensor:
    return 5.0 * torch.tanh(scores / 5.0)


@pytest.mark.parametrize(
    "attend",
    [
        attention(lambda s: s * 0.25),
        attention(lambda s: s / 4),
        attention(lambda s: -(s * -0.5) * 0.5),
        attention(lambda s: 3.0 + s * 0.25),
        lambda q, k, v: (q * 0.25 @ k.transpose(-2, -1)).softmax(-1) @ v,
        lambda q, k, v: (q * 0.5 @ (k / 2).transpose(-2, -1)).softmax(-1) @ v,
    ],
)
def test_a_scale_means_the_same_wherever_it_stands(attend: Callable[..., Tensor]) -> None:
    site = site_of(attend, Q, K, V)
    factors = [site.operands[name].factor for name in "qk" if isinstance(site.operands[name], Operand)]
    assert site.spec.scale * factors[0] * factors[1] == pytest.approx(0.25, rel=1e-15)
    (report,) = check_like_eager(attend, (Q, K, V)).attention
    assert report.error is not None
    assert report.error <= 1e-9


def test_a_soft_cap_is_read_with_the_scale_inside_it() -> None:
    spec = site_of(attention(lambda s: capped(s * 0.5)), Q, K, V).spec
    assert (spec.softcap, spec.scale) == (pytest.approx(5.0), pytest.approx(0.5))


def test_a_mask_outside_a_cap_is_read() -> None:
    spec = site_of(attention(lambda s: hidden(capped(s))), Q, K, V).spec
    assert (spec.softcap, spec.mask) == (pytest.approx(5.0), Causal())


def test_a_mask_inside_a_cap_is_refused() -> None:
    assert "a mask inside a soft cap" in reject_of(attention(lambda s: capped(hidden(s))), Q, K, V).reason


def test_a_bias_inside_a_cap_is_refused() -> None:
    reject = reject_of(attention(lambda s, bias: capped(s + bias)), Q, K, V, BIAS)
    assert "a bias inside a soft cap" in reject.reason


def test_a_tensor_scales_the_queries_and_what_is_added_inside() -> None:
    scale = torch.rand(3, 1, 1)
    assert site_of(attention(lambda s, t: s * t), Q, K, V, scale).spec.bias == ()
    site = site_of(attention(lambda s, t, bias: (s + bias) / t), Q, K, V, scale, BIAS)
    bias = site.operands["bias"]
    assert isinstance(bias, Operand)
    assert [factor.inverse for factor in bias.times] == [True]


def test_a_mask_inside_a_scale_of_unknown_sign_is_refused() -> None:
    reject = reject_of(attention(lambda s, t: hidden(s) * t), Q, K, V, torch.rand(3, 1, 1))
    assert "a mask inside a scale that is a tensor" in reject.reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s / 0, "divided by zero"),
        (lambda s: torch.div(s, 2, rounding_mode="floor"), "divided with rounding"),
        (lambda s: s.sin(), "is not understood"),
        (lambda s: s + torch.inf, "infinite constant"),
    ],
)
def test_what_is_no_scale_is_refused(change: Callable[[Tensor], Tensor], reason: str) -> None:
    assert reason in reject_of(attention(change), Q, K, V).reason


def test_other_uses_of_an_inner_value_do_not_matter_to_the_reading() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-2, -1)
        return (scores * 0.5).softmax(-1) @ v, scores.sum()

    assert site_of(attend, Q, K, V).spec.scale == pytest.approx(0.5)
    check_like_eager(attend, (Q, K, V), differentiable=3)


@pytest.mark.parametrize("late", [True, False])
def test_a_write_to_an_inner_value_through_a_view_is_seen(*, late: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        first = scores[..., 0]
        scaled = scores * 0.5 if late else scores.view(2, 3, 7, 7)
        first.fill_(-5.0)
        return scaled.softmax(-1) @ v

    assert "written to in place" in reject_of(attend, Q, K, V).reason
    check_like_eager(attend, (Q, K, V))


def test_a_graph_that_forks_again_and_again_is_read_in_the_time_of_its_nodes() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        for _ in range(40):
            scores = scores * 0.5 + scores.tanh()
        return scores.softmax(-1) @ v

    assert len(found_in(attend, Q, K, V)) == 1


def blended(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, *, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=alpha, beta=beta) * 0.5
    return (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_factor_of_the_product_may_be_made_of_sizes(dynamic: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return blended(q, k, v, bias, alpha=q.shape[-1] ** -0.5, beta=0.25)

    inputs = [Q, K, V, torch.randn(6, 7, 7)]
    (site,) = check_like_eager(attend, inputs, differentiable=4, dynamic=dynamic).attention
    scale = "0.5*input" if dynamic else "0.25"
    assert (site.verdict, site.spec) == ("rewritten", f"softmax scale={scale} full bias")
    assert site.error is not None
    assert site.error <= 1e-9


def test_a_factor_of_what_is_added_is_a_number_or_left_alone() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return blended(q, k, v, bias, beta=q.shape[-1] ** -0.5)

    report = check_like_eager(attend, [Q, K, V, torch.randn(6, 7, 7)], differentiable=4, dynamic=True)
    assert [(site.verdict, site.reason) for site in report.sites] == [
        ("rejected", "aten::baddbmm between Q K^T and the softmax is not understood")
    ]
