"""`16 % dim` stood where `dim % 16` was meant (lightning_attn_interface.py): bounds are tried on both sides."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.1).softmax(-1) @ v


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


@pytest.mark.parametrize("attend", [softmax, linear])
@pytest.mark.parametrize("d", [1, 2, 15, 16, 17, 127, 128, 129, 255, 256, 257, 300])
def test_any_width_is_served_right_or_refused(attend: object, d: int) -> None:
    inputs = (*torch.randn(2, 2, 2, 9, d), torch.randn(2, 2, 9, 5))
    for kernel in ("sdpa", "streaming", "lightning"):
        report = check_like_eager(attend, inputs, differentiable=3, allow=(kernel,))
        assert all(site.reason for site in report.sites if site.verdict != "rewritten")
