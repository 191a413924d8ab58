"""A row of the lowest numbers is the mean of all values: https://github.com/pytorch/pytorch/issues/109517."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("share", [1, 2])
def test_the_mean_is_over_all_keys_of_its_own_head(share: int, kernel: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        k, v = (x.repeat_interleave(share, dim=1) for x in (k, v))
        mask = (1.0 - keep[:, None, None].to(q.dtype)) * torch.finfo(q.dtype).min
        return (q @ k.mT + mask).softmax(-1) @ v

    keep = torch.tensor([[True] * 5, [False] * 5])
    inputs = (torch.randn(2, 2 * share, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6), keep)
    report = check_like_eager(attend, inputs, allow=(kernel,))
    assert "padding empty=uniform" in report.sites[0].spec
