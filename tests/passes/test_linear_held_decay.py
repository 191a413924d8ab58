"""Rates that a module holds: below 0 while compiling, and looked at again when they may have changed."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from compiling import check_like_eager, compiled, reports_after
from torch import Tensor, nn

import attnopt
from attnopt.passes.mask_literals import Negative, form_of

H, S, D = 4, 12, 8


class Retention(nn.Module):
    """microsoft/torchscale, retnet.py and multiscale_retention.py: infinite distances become decays of nothing."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__()
        self.rates = nn.Buffer(sign * torch.log(1 - 2 ** (-2 - torch.arange(H, dtype=torch.float))))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2]).to(self.rates)
        hidden = ~torch.tril(torch.ones(q.shape[2], q.shape[2]).to(self.rates)).bool()
        matrix = torch.masked_fill(at[:, None] - at[None, :], hidden, float("inf"))
        matrix = torch.nan_to_num(torch.exp(matrix * self.rates[:, None, None]))
        matrix = matrix / matrix.sum(dim=-1, keepdim=True).sqrt()
        weights = (q @ k.transpose(-1, -2)) * matrix.to(q)
        return (weights / weights.detach().sum(dim=-1, keepdim=True).abs().clamp(min=1)) @ v


def inputs() -> list[Tensor]:
    return [torch.randn(2, H, S, D) for _ in range(3)]


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_rates_below_zero_are_read(dynamic: bool) -> None:
    report = check_like_eager(Retention(), inputs(), differentiable=3, dynamic=dynamic)
    (site,) = report.attention
    wanted = "linear scale=1/tensor causal decay per head normalised(eps=0, floor=1.0, detached)"
    assert (site.verdict, site.spec) == ("rewritten", wanted), site.reason


def test_rates_above_zero_are_refused() -> None:
    before = attnopt.reports()
    model = Retention(-1.0)
    given = inputs()
    got = compiled(model)(*given)
    (site,) = reports_after(before).attention
    assert (site.verdict, "not proven" in site.reason) == ("refused", True)
    assert torch.equal(got.isfinite(), model(*given).isfinite())


def test_rates_that_are_given_are_refused() -> None:
    model = Retention()

    def attend(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
        at = torch.arange(q.shape[2]).to(rates)
        hidden = (at[:, None] - at[None, :]) < 0
        matrix = torch.masked_fill(at[:, None] - at[None, :], hidden, float("inf"))
        return ((q @ k.mT) * torch.nan_to_num(torch.exp(matrix * rates[:, None, None]))) @ v

    report = check_like_eager(attend, [*inputs(), model.rates.detach().clone()])
    assert [site.verdict for site in report.attention] == ["refused"]


def test_rates_that_rise_above_zero_later_are_seen() -> None:
    model, given = Retention(), inputs()
    call = compiled(model)
    torch.testing.assert_close(call(*given), model(*given))
    model.rates.mul_(0.5)  # still below 0: the same kernel
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(call(*given), model(*given))
    model.rates[1] = 0.25
    with pytest.warns(RuntimeWarning, match="changed since it was compiled"):
        got = call(*given)
    torch.testing.assert_close(got, model(*given), equal_nan=True)


def test_the_form_of_numbers_below_zero() -> None:
    assert form_of(torch.tensor([-0.5, -0.25, -0.125])) == Negative()
    assert form_of(torch.tensor([[[-0.5]], [[-0.3]]])) == Negative()
    for held in (
        [-0.5, 0.0, -0.3],
        [-0.5, 0.25, 1.5],
        [-0.5, -float("inf"), -0.1],
        [-0.5, float("nan"), -0.1],
    ):
        assert form_of(torch.tensor(held)) is None
    assert form_of(torch.tensor([[-0.5, -0.25], [-0.5, -0.125]])) is None
