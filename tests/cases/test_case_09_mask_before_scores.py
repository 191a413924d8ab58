"""`mask + scores`, and an fp32 mask beside fp16 operands: https://github.com/pytorch/pytorch/issues/195782, 195784."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("first", [True, False])
def test_a_mask_may_come_first_and_in_another_dtype(dtype: torch.dtype, *, first: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.full((7, 7), float("-inf")).triu(1)
        scores = q @ k.mT * 0.25
        scores = mask + scores if first else scores + mask
        return scores.softmax(-1).to(v.dtype) @ v

    report = check_like_eager(attend, torch.randn(3, 2, 4, 7, 16).to(dtype).unbind())
    assert [site.spec for site in report.sites] == ["softmax scale=0.25 causal"]
