"""Weights that somebody else needs are not fused away.

https://github.com/pytorch/pytorch/blob/main/test/inductor/test_fused_attention.py (reuse test)
"""

import torch
from compiling import check_like_eager
from torch import Tensor, nn


def test_weights_that_are_returned_are_still_there() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights

    report = check_like_eager(attend, torch.randn(3, 2, 6, 8).unbind(), differentiable=3)
    assert [site.verdict for site in report.sites] == ["kept"]


def test_the_averaged_weights_of_multihead_attention_are_still_there() -> None:
    layer = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    compiled = torch.compile(layer, backend="attnopt", options={"inner": "aot_eager"})
    for got, wanted in zip(compiled(x, x, x), layer(x, x, x), strict=True):
        torch.testing.assert_close(got, wanted)
