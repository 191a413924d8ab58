"""Keys that are rotated already are not rotated again, and those that are not stay so.

https://github.com/huggingface/transformers/issues/35350, https://github.com/mit-han-lab/streaming-llm/issues/73
"""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


def rotated(x: Tensor, start: int) -> Tensor:
    """Rotary embedding of positions from `start` on; Su et al. 2021, arXiv:2104.09864, eq. 34."""
    half = x.shape[-1] // 2
    angle = torch.arange(start, start + x.shape[-2])[:, None] * 100.0 ** (-torch.arange(half) / half)
    cos, sin = (torch.cat([f(angle), f(angle)], -1).to(x.dtype) for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@pytest.mark.parametrize("stored", ["rotated", "plain"])
@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
def test_a_cache_is_attended_as_it_is_stored(stored: str, kernel: str) -> None:
    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        past = keys.shape[2]
        if stored == "rotated":
            keys = torch.cat([keys, rotated(k, past)], 2)
        else:
            keys = rotated(torch.cat([keys, k], 2), 0)
        values = torch.cat([values, v], 2)
        return (rotated(q, past) @ keys.mT * 0.25).softmax(-1) @ values

    inputs = (*torch.randn(3, 2, 4, 1, 16), *torch.randn(2, 2, 4, 9, 16))
    report = check_like_eager(step, inputs, allow=(kernel,))
    assert [site.verdict for site in report.sites] == ["rewritten"]
