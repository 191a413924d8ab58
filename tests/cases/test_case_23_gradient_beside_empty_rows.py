"""What comes back through a row without keys must not spoil the others: https://github.com/Xilinx/brevitas/pull/1591."""

import pytest
import torch
from compiling import compiled
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~seen, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
def test_gradients_are_those_of_the_rows_that_see_keys(kernel: str) -> None:
    seen = torch.rand(6, 6) > 0.3
    seen[2] = False
    there = [0, 1, 3, 4, 5]
    tensors = [x.requires_grad_() for x in torch.randn(3, 2, 4, 6, 8).unbind()]
    q, k, v = tensors
    wanted = torch.autograd.grad(attend(q[:, :, there], k, v, seen[there]).square().sum(), tensors)
    out = compiled(attend, allow=(kernel,), inner="aot_eager")(q, k, v, seen)
    got = torch.autograd.grad(out[:, :, there].square().sum(), tensors)
    torch.testing.assert_close(got, wanted)
