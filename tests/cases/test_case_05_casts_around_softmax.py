"""Casts around the softmax are part of what is computed: https://github.com/pytorch/pytorch/issues/171190."""

import pytest
import torch
from compiling import check_like_eager, compiled
from torch import Tensor


@pytest.mark.parametrize("working", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("softmax_in", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_of_the_result_is_eagers(working: torch.dtype, softmax_in: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        exact = q.dtype == torch.float64  # the yardstick rounds nowhere
        scores = (q @ k.mT).to(torch.float64 if exact else softmax_in)
        return scores.softmax(-1).to(v.dtype) @ v

    check_like_eager(attend, torch.randn(3, 2, 6, 16).to(working).unbind())


def test_what_eager_refuses_is_refused() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).float().softmax(-1) @ v  # float times bfloat16

    inputs = torch.randn(3, 2, 6, 16).bfloat16().unbind()
    with pytest.raises(RuntimeError):
        attend(*inputs)
    with pytest.raises(RuntimeError):
        compiled(attend)(*inputs)
