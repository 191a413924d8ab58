"""A large scale must not cost precision beyond eager's: https://github.com/pytorch/pytorch/issues/151098."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


@pytest.mark.parametrize("scale", [2.0, 8.0, 64.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_logits_are_as_good_as_eagers(scale: float, dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * scale).softmax(-1) @ v

    check_like_eager(attend, torch.randn(3, 2, 4, 65, 32).to(dtype).unbind())
