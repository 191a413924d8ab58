"""Tuning runs a kernel many times on one output: what is added there is added many times.

https://github.com/triton-lang/triton/issues/3004, 9230, 6547, 7181
"""

import pytest
import torch
from graphs import rewritten
from source import PACKAGE
from torch import Tensor


def test_tiles_are_chosen_not_tried_out() -> None:
    kernels = [module for module in PACKAGE if module.name.startswith("attnopt.kernels.")]
    assert [m.name for m in kernels if "autotune" in m.text.replace("No @triton.autotune", "")] == []


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
def test_a_second_call_gives_the_same_bits(kernel: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(torch.ones(9, 9).triu(1).bool(), float("-inf")).softmax(-1) @ v

    inputs = torch.randn(3, 2, 4, 9, 16).unbind()
    run = rewritten(attend, *inputs, allow=(kernel,))
    first = run(*inputs)
    run(*(x + 1 for x in inputs))
    assert torch.equal(run(*inputs), first)
