"""Sequences of length 0 and 1: https://github.com/Dao-AILab/flash-attention/pull/2470, pytorch 174950, 81077."""

from itertools import product

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor
from torch.nn import functional


def spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v


def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("attend", [spelled, causal, library])
@pytest.mark.parametrize("dynamic", [False, True])
def test_zero_and_one_are_lengths_like_others(attend: object, *, dynamic: bool) -> None:
    for batch, heads, sq, sk in product((0, 2), (1, 2), (0, 1, 3), (0, 1, 3)):
        inputs = (torch.randn(batch, heads, sq, 8), *torch.randn(2, batch, heads, sk, 8))
        check_like_eager(attend, inputs, dynamic=dynamic)
