"""Q K^T that overflows fp16 before it is scaled: no worse than eager, and finite where the exact result is.

https://github.com/philipturner/metal-flash-attention/issues/8, https://github.com/ultralytics/ultralytics/pull/24990
"""

import pytest
import torch
from compiling import compiled, widened
from oracle import assert_same
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 1e-4).softmax(-1) @ v


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
def test_the_scores_are_not_held_in_half(kernel: str) -> None:
    inputs = [
        x.half()
        for x in (60 * torch.randn(2, 4, 7, 64), 60 * torch.randn(2, 4, 7, 64), torch.randn(2, 4, 7, 8))
    ]
    assert not bool(attend(*inputs).isfinite().all())
    assert_same(compiled(attend, allow=(kernel,))(*inputs), attend(*widened(inputs)))
