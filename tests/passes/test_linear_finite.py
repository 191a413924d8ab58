"""Factors of queries and keys that are infinite whatever the data are refused; others are read."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import found_in, reject_of
from torch import Tensor

B, H, S, D = 2, 3, 7, 4


def heads() -> tuple[Tensor, ...]:
    """Queries, keys and values, and a number from 0.5 to 1.5 for each head."""
    torch.manual_seed(0)
    return (*torch.randn(3, B, H, S, D).unbind(), torch.rand(H) + 0.5)


def times(factor: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Causal scores times factor(rates (H, 1, 1), positions (S, 1)), times the values."""

    def attend(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
        return (q @ k.mT * factor(rate[:, None, None], torch.arange(S)[:, None])).tril() @ v

    return attend


@pytest.mark.parametrize(
    "factor",
    [
        lambda rate, at: 1.0 / (rate * (at - at)),
        lambda rate, at: (rate * 0.0 * at).reciprocal(),
        lambda rate, at: 1.0 / (rate * at),
        lambda rate, at: rate / (at - 3),
    ],
    ids=["all", "by a literal", "the first", "the fourth"],
)
def test_what_is_infinite_whatever_the_data_is_refused(factor: Callable[[Tensor, Tensor], Tensor]) -> None:
    (found,) = found_in(times(factor), *heads())
    assert found.site is None


def test_the_reason_says_what_to_choose() -> None:
    reason = reject_of(times(lambda rate, at: rate / (at - 3)), *heads()).reason
    assert reason == (
        "the weights are multiplied by a number for each position that is infinite for some; "
        "choose the base of a power and the divisor of a quotient other than 0"
    )


@pytest.mark.parametrize(
    "factor",
    [
        lambda rate, at: 1.0 / (rate * (at + 1)),
        lambda rate, at: rate / (at - 3.5),
        lambda rate, at: (1.5 - rate).sqrt() * (at + 1),
        lambda rate, at: (rate * rate * at).exp2(),
    ],
    ids=["from one", "between two", "NaN for other data", "infinite for other data"],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_finite_is_read(factor: Callable[[Tensor, Tensor], Tensor], dynamic: bool) -> None:
    report = check_like_eager(times(factor), heads(), differentiable=3, dynamic=dynamic)
    assert [site.verdict for site in report.sites] == ["rewritten"]


def test_a_factor_that_a_mask_makes_infinite_is_refused() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        kept = keep.to(q.dtype)
        return (q @ k.mT * kept / ((1 - kept) * -1e4)).softmax(-1) @ v

    keep = torch.ones(B, 1, 1, S, dtype=torch.bool)
    keep[0, ..., :3] = False
    (found,) = found_in(attend, *heads()[:3], keep)
    assert found.site is None
