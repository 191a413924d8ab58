"""A Python number is a double: a kernel must not hold it as a single (comment in Liger-Kernel, ops/rms_norm.py)."""

import pytest
import torch
from graphs import rewritten
from torch import Tensor

NUMBERS = {"a third": 1 / 3, "a tenth": 0.1, "large": 7.7e5}


@pytest.mark.parametrize("kernel", ["sdpa", "streaming", "lightning"])
@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_a_scale_keeps_all_its_digits(kernel: str, number: float) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * number
        return scores.tril() @ v if kernel == "lightning" else (scores / 1e3).softmax(-1) @ v

    inputs = torch.randn(3, 2, 3, 9, 8, dtype=torch.float64).unbind()
    run = rewritten(attend, *inputs, allow=(kernel,))
    torch.testing.assert_close(run(*inputs), attend(*inputs), rtol=1e-11, atol=0)


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
def test_a_cap_keeps_all_its_digits(kernel: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (4.7 * torch.tanh(q @ k.mT / 4.7)).softmax(-1) @ v

    inputs = torch.randn(3, 2, 3, 9, 8, dtype=torch.float64).unbind()
    torch.testing.assert_close(
        rewritten(attend, *inputs, deny=(kernel,))(*inputs), attend(*inputs), rtol=1e-11, atol=0
    )
