"""`scores += bias` stores the sum as the scores are: a number that is infinite there hides altogether."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager, compiled
from torch import Tensor

import attnopt

Q, K, V = (torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3))
BIAS = torch.randn(4, 6, 6, generator=torch.Generator().manual_seed(3))
LOWEST = torch.finfo(torch.float32).min
KEPT = torch.tensor([[1.0] * 6, [1, 1, 1, 1, 0, 0]])
NOTHING = torch.tensor([[0.0] * 6, [1, 1, 1, 1, 0, 0]])
Make = Callable[[Tensor, Tensor], Tensor]

ADDED: dict[str, Make] = {
    "a bias": lambda b, _: b,
    "padding": lambda b, m: (1.0 - m[:, None, None]) * LOWEST,
    "a bias with padding": lambda b, m: b + (1.0 - m[:, None, None]) * LOWEST,
    "a bias with causality": lambda b, m: b + torch.full((6, 6), LOWEST).triu(1),
    "a filled bias": lambda b, m: b.masked_fill(torch.ones(6, 6).triu(1).bool(), LOWEST),
}


def attend(added: Make, *, wide: bool) -> Callable[..., Tensor]:
    """T5 takes its softmax in float32."""

    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, kept: Tensor) -> Tensor:
        scores = q @ k.mT
        scores += added(bias, kept)
        return (scores.float() if wide else scores).softmax(-1).type_as(q) @ v

    return function


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", ADDED)
def test_a_wider_bias_is_read(name: str, wide: bool) -> None:
    report = check_like_eager(attend(ADDED[name], wide=wide), (Q, K, V, BIAS, KEPT), differentiable=3)
    (site,) = report.sites
    assert site.verdict == "rewritten", site.reason
    assert ("causal" in site.spec) == (name in ("a bias with causality", "a filled bias"))


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", ADDED)
def test_rows_that_it_hides_altogether_are_nan_as_in_eager_mode(name: str, wide: bool) -> None:
    function = attend(ADDED[name], wide=wide)
    got, want = (f(Q, K, V, BIAS, NOTHING) for f in (compiled(function), function))
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, equal_nan=True, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("hidden", [-7e4, LOWEST])
def test_a_type_that_ends_near_the_scores_is_refused_where_it_stores_a_wider_sum(hidden: float) -> None:
    """-7e4 is -inf in float16, and -7e4 plus a score need not be."""
    bias = torch.zeros(4, 6, 6)
    bias[:, 2] = hidden
    function = attend(lambda b, _: b, wide=True)
    half = (Q.half() * 60, K.half() * 30, V.half())
    got, want = (f(*half, bias, KEPT) for f in (compiled(function), function))
    torch.testing.assert_close(got, want, equal_nan=True, rtol=0.01, atol=0.01)
    (site,) = attnopt.reports()[-1].sites
    assert "may not hold it" in site.reason


def test_a_narrower_bias_is_stored_as_the_scores_are() -> None:
    inputs = (Q.float(), K.float(), V.float(), BIAS.bfloat16(), KEPT)
    report = check_like_eager(attend(ADDED["a bias"], wide=True), inputs, differentiable=4)
    assert [site.verdict for site in report.sites] == ["rewritten"]
