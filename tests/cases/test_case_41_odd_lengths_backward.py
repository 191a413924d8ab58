"""The backward pass at lengths that are no multiple of a tile: https://github.com/pytorch/pytorch/issues/153799."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    scores = q @ k.mT * 0.25 - slopes[:, None, None] * at.abs()
    return scores.masked_fill((at < 0) | (at >= 40), float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("length", [1, 2, 15, 17, 63, 65, 127, 129, 200])
def test_gradients_are_eagers_at_any_length(kernel: str, length: int) -> None:
    inputs = (*torch.randn(3, 1, 2, length, 16), torch.tensor([0.5, 0.25]))
    report = check_like_eager(attend, inputs, differentiable=3, allow=(kernel,))
    assert (length, kernel) == (1, "streaming") or kernel == "sdpa" or report.having("rewritten")
