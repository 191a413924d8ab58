"""A bool tensor that is added is a bias of 0 and 1, not a mask: https://github.com/pytorch/pytorch/issues/100318."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT + mask, -1) @ v


@pytest.mark.parametrize("share_true", [0.0, 0.5, 1.0])
def test_a_boolean_that_is_added_counts_one(share_true: float) -> None:
    mask = torch.rand(5, 5) < share_true
    report = check_like_eager(attend, (*torch.randn(3, 2, 2, 5, 8), mask))
    assert [site.spec for site in report.sites] == ["softmax scale=1 full bias"]
