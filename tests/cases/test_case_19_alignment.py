"""A causal mask starts at the top left (torch) or ends at the bottom right; traced for all small sizes.

https://github.com/pytorch/pytorch/issues/108108, 103082, 144858
"""

from itertools import product

import pytest
import torch
from graphs import rewritten
from torch import Tensor
from torch.nn import functional

SIZES = list(product(range(1, 7), range(2, 7)))


def top_left(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def top_left_spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(torch.ones(q.shape[2], k.shape[2]).triu(1).bool(), float("-inf")).softmax(
        -1
    ) @ v


def bottom_right(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2]).triu(1 + k.shape[2] - q.shape[2]).bool()
    return (q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("attend", [top_left, top_left_spelled, bottom_right])
def test_a_tracer_sees_the_mask_exactly(attend: object, kernel: str) -> None:
    """Zero queries weigh all visible keys alike; with one-hot values the output is the mask over its row sums."""
    for sq, sk in SIZES:
        q, k, v = torch.zeros(1, 1, sq, 4), torch.randn(1, 1, sk, 4), torch.eye(sk)[None, None]
        out = rewritten(attend, q, k, v, allow=(kernel,))(q, k, v)[0, 0]
        offset = sk - sq if attend is bottom_right else 0
        seen = torch.ones(sq, sk).tril(offset)
        shown = torch.where(seen.any(-1, keepdim=True), seen, torch.nan)
        assert torch.equal((out * seen.sum(-1, keepdim=True)).round().nan_to_num(7), shown.nan_to_num(7)), (
            sq,
            sk,
        )
