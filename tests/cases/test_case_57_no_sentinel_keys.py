"""Hidden keys are left out, not replaced by some far-away key: https://github.com/NVIDIA/kvpress/issues/268."""

import pytest
import torch
from compiling import compiled
from torch import Tensor


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_numbers_behind_a_mask_change_nothing(kernel: str, dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT * 1e-3).masked_fill(~keep[:, None, None], torch.finfo(q.dtype).min).softmax(-1) @ v

    q, k, v = torch.randn(3, 2, 4, 6, 8).to(dtype)
    keep = torch.tensor([[True] * 4 + [False] * 2, [False] + [True] * 5])
    run = compiled(attend, allow=(kernel,))
    before = run(q, k, v, keep)
    hidden = ~keep[:, None, :, None]
    extreme = k.masked_fill(hidden, 200.0), v.masked_fill(hidden, torch.finfo(torch.float16).max)
    assert torch.equal(run(q, *extreme, keep), before)
