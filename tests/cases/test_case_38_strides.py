"""Tensors that are not contiguous: https://github.com/huggingface/candle/pull/3703."""

import pytest
import torch
from compiling import run
from graphs import rewritten
from torch import Tensor

LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.cat([x, x], -1)[..., ::2],
    "reversed order": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_a_layout_changes_neither_results_nor_gradients(layout: str, kernel: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT * 0.25).softmax(-1) @ v

    inputs = [LAYOUTS[layout](x) for x in torch.randn(3, 2, 4, 7, 16, dtype=torch.float64)]
    got, wanted = run(rewritten(attend, *inputs, allow=(kernel,)), inputs, 3), run(attend, inputs, 3)
    torch.testing.assert_close((got.outputs, got.gradients), (wanted.outputs, wanted.gradients))
