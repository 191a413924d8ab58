"""A number of heads that is no multiple of the key heads is an error, not memory beyond the end.

https://github.com/fla-org/flash-linear-attention/issues/1029
"""

import pytest
import torch
from compiling import compiled
from torch import Tensor
from torch.nn import functional


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def test_it_fails_with_and_without_attnopt() -> None:
    inputs = (torch.randn(1, 3, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    with pytest.raises(RuntimeError):
        attend(*inputs)
    with pytest.raises(RuntimeError):
        compiled(attend)(*inputs)
