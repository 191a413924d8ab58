"""Keys and values with a stride of 0: https://github.com/pytorch/pytorch/issues/191937."""

import pytest
import torch
from compiling import compiled
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1) @ v


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("keys", [31, 32, 33, 65])
def test_expanded_tensors_are_read_as_they_are(keys: int, kernel: str) -> None:
    q = torch.randn(2, 4, 7, 16)
    k, v = (x.expand(2, 4, keys, 16) for x in torch.randn(2, 1, 1, keys, 16))
    same, same_v = (x.expand(2, 4, keys, 16) for x in torch.randn(2, 2, 4, 1, 16))
    run = compiled(attend, allow=(kernel,))
    torch.testing.assert_close(run(q, k, v), attend(q, k, v))
    torch.testing.assert_close(run(q, same, same_v), attend(q, same, same_v))
