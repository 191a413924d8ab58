"""Code that adds its mask may be given a bool one, and left padding: https://github.com/huggingface/transformers/pull/48363."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.mT * 0.25 + mask[:, None]).softmax(-1) @ v


def told_apart(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1) @ v
    return (scores + mask[:, None].to(scores.dtype)).softmax(-1) @ v


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attend", [added, told_apart])
def test_the_operation_says_what_a_mask_means(attend: object, dtype: torch.dtype) -> None:
    seen = torch.ones(5, 5, dtype=torch.bool).tril() & (torch.arange(5) >= torch.tensor([[0], [2]]))[:, None]
    seen = seen | torch.eye(5, dtype=torch.bool)
    mask = seen if dtype == torch.bool else torch.zeros(2, 5, 5, dtype=dtype).masked_fill(~seen, -1e9)
    report = check_like_eager(attend, (*torch.randn(3, 2, 3, 5, 8), mask), differentiable=2)
    assert [site.verdict for site in report.sites] == ["rewritten"]
