"""A scale that eager rounds away is folded only as far as the row rule goes.

https://github.com/pytorch/pytorch/issues/132301
"""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("factor", [0.51, 0.0884, 1.3])
def test_a_folded_scale_is_no_worse_than_eagers_rounding(dtype: torch.dtype, factor: float) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ (k * factor).mT).softmax(-1) @ v

    report = check_like_eager(attend, torch.randn(3, 2, 4, 33, 16).to(dtype).unbind())
    assert [site.verdict for site in report.sites] == ["rewritten"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tensor_scale_in_a_precise_product_stays_precise(dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor) -> Tensor:
        scores = (q.float() @ k.float().mT) * temperature
        return scores.softmax(-1).to(v.dtype) @ v

    q, k, v = (4 * torch.randn(3, 2, 4, 33, 16)).to(dtype).unbind()
    check_like_eager(attend, (q, k, v, torch.tensor(0.3517)))
