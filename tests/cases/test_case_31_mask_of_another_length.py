"""A mask is a function of positions, made anew for every length.

https://github.com/pytorch/pytorch/pull/141625, https://github.com/meta-pytorch/attention-gym/issues/31
"""

import torch
from compiling import compiled
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    seen = (j <= i) & (i - j < 3)
    return (q @ k.mT).masked_fill(~seen, float("-inf")).softmax(-1) @ v


def test_one_compiled_function_serves_all_lengths() -> None:
    run = compiled(attend, dynamic=True)
    for length in (5, 9, 2, 17):
        q, k, v = torch.randn(3, 2, length, 8)
        torch.testing.assert_close(run(q, k, v), attend(q, k, v))
