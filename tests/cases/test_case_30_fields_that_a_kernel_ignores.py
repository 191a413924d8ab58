"""A soft cap or slopes that a kernel takes and ignores; slopes off by one in decoding.

https://github.com/vllm-project/vllm-xpu-kernels/pull/489, https://github.com/vllm-project/vllm/pull/945
"""

import dataclasses

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

from attnopt.registry import kernels
from attnopt.spec import AttentionSpec, unread_fields


@pytest.mark.parametrize("kernel", [k for k in kernels() if k.exact], ids=lambda k: k.name)
def test_a_field_that_is_not_read_refuses_the_site(kernel: object) -> None:
    unread = {f.name for f in dataclasses.fields(AttentionSpec)} - kernel.reads
    plain = AttentionSpec("softmax", 1.0)
    odd = dataclasses.replace(plain, softcap=5.0, bias=("bias",), dropout=0.1)
    assert {"softcap", "bias", "dropout"} & unread <= set(unread_fields(odd, kernel.reads))
    assert set(unread_fields(odd, kernel.reads)) <= unread


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize(("sq", "sk"), [(1, 9), (3, 9), (9, 9)])
def test_slopes_count_from_the_last_key(kernel: str, sq: int, sk: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
        at = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None] - torch.arange(k.shape[2])
        scores = q @ k.mT - slopes[:, None, None] * at
        return scores.masked_fill(at < 0, float("-inf")).softmax(-1) @ v

    inputs = (torch.randn(2, 4, sq, 8), *torch.randn(2, 2, 4, sk, 8), torch.tensor([0.5, 0.25, 0.125, 1.0]))
    for dynamic in (False, True):
        with torch.no_grad():
            report = check_like_eager(attend, inputs, allow=(kernel,), dynamic=dynamic)
        assert report.having("rewritten")


@pytest.mark.parametrize("cap", [2.0, 30.0])
def test_a_soft_cap_is_kept_whoever_serves_it(cap: float) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (cap * torch.tanh(q @ k.mT / cap)).softmax(-1) @ v

    check_like_eager(attend, (5 * torch.randn(3, 2, 4, 7, 16)).unbind(), differentiable=3)
