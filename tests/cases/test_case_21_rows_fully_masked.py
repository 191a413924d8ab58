"""A row that sees no key is NaN, zero or the mean, as the graph has it.

https://github.com/pytorch/pytorch/issues/103963, https://github.com/ml-explore/mlx/pull/2608
"""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor
from torch.nn import functional


def nan(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen, q @ k.mT, float("-inf")).softmax(-1) @ v


def nan_by_addition(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return (q @ k.mT + torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, float("-inf"))).softmax(
        -1
    ) @ v


def zero(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def uniform(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) @ v


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("attend", [nan, nan_by_addition, zero, uniform])
def test_an_empty_row_keeps_its_meaning(attend: object, dtype: torch.dtype, kernel: str) -> None:
    seen = torch.rand(2, 1, 6, 6) > 0.4
    seen[0, 0, 2], seen[1] = False, False
    check_like_eager(attend, (*torch.randn(3, 2, 4, 6, 8).to(dtype), seen), allow=(kernel,))


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
def test_a_bias_of_minus_infinity_hides_like_a_mask(kernel: str) -> None:
    def spelled(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT + bias).softmax(-1) @ v

    def library(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    bias = torch.randn(6, 6)
    bias[2], bias[3, 1] = float("-inf"), float("-inf")
    for attend in (spelled, library):
        check_like_eager(attend, (*torch.randn(3, 2, 4, 6, 8), bias), allow=(kernel,))
