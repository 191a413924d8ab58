"""A row of the lowest numbers is the mean of all values: https://github.com/pytorch/pytorch/issues/109517."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min


def filled(scores: Tensor, keep: Tensor) -> Tensor:
    return scores.masked_fill(~keep[:, None, None], LOWEST)


def added(scores: Tensor, keep: Tensor) -> Tensor:
    return scores + (1.0 - keep[:, None, None].to(scores.dtype)) * LOWEST


def check(share: int, kernel: str, hide: Callable[[Tensor, Tensor], Tensor], meaning: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
        return hide(q @ k.mT, keep).softmax(-1) @ v

    keep = torch.tensor([[True] * 5, [False] * 5])
    inputs = (torch.randn(2, 2 * share, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6), keep)
    report = check_like_eager(attend, inputs, differentiable=3, allow=(kernel,))
    assert [site.verdict for site in report.sites] == ["rewritten"]
    assert f"padding empty={meaning}" in report.sites[0].spec


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("share", [1, 2])
def test_the_mean_is_over_all_keys_of_its_own_head(share: int, kernel: str) -> None:
    check(share, kernel, filled, "uniform")


@pytest.mark.parametrize("share", [1, 2])
def test_gradients_pass_a_lowest_number_that_is_added(share: int) -> None:
    check(share, "sdpa", added, "absorbed")
