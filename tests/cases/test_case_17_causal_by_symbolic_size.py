"""`is_causal = Sq > 1` with symbolic sizes: https://github.com/huggingface/transformers/pull/36374."""

import torch
from compiling import compiled
from torch import Tensor
from torch.nn import functional


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1)


def test_prefill_and_decode_take_their_own_branch() -> None:
    run = compiled(attend, dynamic=True)
    for queries in (7, 1, 5, 1):
        q, k, v = torch.randn(2, 4, queries, 16), *torch.randn(2, 2, 4, 7, 16)
        torch.testing.assert_close(run(q, k, v), attend(q, k, v))
