"""Heads that are tiled are not heads that are repeated.

https://github.com/ekzhang/jax-js/pull/180, https://github.com/fkodom/grouped-query-attention-pytorch/issues/5
"""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("tiled", [True, False])
def test_each_head_reads_its_own_values(kernel: str, *, tiled: bool) -> None:
    def shared(x: Tensor) -> Tensor:
        return x.repeat(1, 3, 1, 1) if tiled else x.repeat_interleave(3, dim=1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ shared(k).mT).softmax(-1) @ shared(v)

    v = torch.arange(2.0).view(1, 2, 1, 1).expand(1, 2, 5, 4)  # head number as value
    inputs = (torch.randn(1, 6, 5, 8), torch.randn(1, 2, 5, 8), v.contiguous())
    report = check_like_eager(attend, inputs, allow=(kernel,))
    assert [site.spec for site in report.sites] == ["softmax scale=1 gqa=3 full"]
