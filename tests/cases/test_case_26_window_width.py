"""A window of W is W keys, the query's own included; a width of 0 is an empty mask.

https://github.com/huggingface/transformers/issues/39408, https://github.com/unslothai/unsloth/pull/8253
"""

import pytest
import torch
from graphs import rewritten
from torch import Tensor


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("width", [0, 1, 2, 3, 6, 7, 9])
def test_a_tracer_counts_the_keys(width: int, kernel: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = torch.arange(7)[:, None] - torch.arange(7)
        seen = (distance >= 0) & (distance < width)
        return (q @ k.mT).masked_fill(~seen, torch.finfo(q.dtype).min).softmax(-1) @ v

    q, k, v = torch.zeros(1, 1, 7, 4), torch.randn(1, 1, 7, 4), torch.eye(7)[None, None]
    out = rewritten(attend, q, k, v, allow=(kernel,))(q, k, v)[0, 0]
    seen = torch.ones(7, 7).tril() - torch.ones(7, 7).tril(-width)
    seen = torch.ones(7, 7) if width == 0 else seen  # nobody sees anything: the mean
    assert torch.equal((out * seen.sum(-1, keepdim=True)).round(), seen)


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
def test_a_window_without_a_causal_mask_is_open_to_the_right(kernel: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(torch.ones(7, 7).tril(-2).bool(), float("-inf")).softmax(-1) @ v

    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(rewritten(attend, q, k, v, deny=(kernel,))(q, k, v), attend(q, k, v))
