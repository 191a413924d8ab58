"""Sequences shorter than any tile: https://github.com/fla-org/flash-linear-attention/issues/88."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


def decayed(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    return (q @ k.mT * torch.exp(-rates[:, None, None] * at).tril()) @ v


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("length", range(1, 10))
def test_linear_attention_over_a_few_tokens(length: int, *, dynamic: bool) -> None:
    inputs = (*torch.randn(3, 2, 3, length, 8), torch.rand(3))
    check_like_eager(decayed, inputs, differentiable=4, dynamic=dynamic)
