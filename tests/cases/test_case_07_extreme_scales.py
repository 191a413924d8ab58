"""A factor moved across the maximum may overflow: https://github.com/pytorch/pytorch/issues/163932."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


@pytest.mark.parametrize("scale", [0.0, -0.0, -1.0, -0.3, 8.0, 1e14, -1e14, 1e-30])
@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
@pytest.mark.parametrize("on", ["scores", "q"])
def test_any_scale_gives_what_eager_gives(scale: float, mask: str, on: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = (q * scale) @ k.mT if on == "q" else (q @ k.mT) * scale
        if mask == "causal":
            scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf"))
        if mask == "padding":
            scores = scores.masked_fill(~keep[:, None, :], float("-inf"))
        return scores.softmax(-1) @ v

    check_like_eager(attend, (*torch.randn(3, 2, 9, 16), torch.arange(9).expand(2, 9) > 2))
