"""The call stands where all that it reads is there: https://github.com/pytorch/pytorch/issues/162019."""

import torch
from compiling import check_like_eager
from torch import Tensor


def test_a_mask_and_values_that_come_late_are_read_in_time() -> None:
    def attend(q: Tensor, k: Tensor, x: Tensor) -> Tensor:
        scores = q @ k.mT
        bias = x.mean(-1)[:, :, None, :].sin()
        weights = (scores + bias).softmax(-1)
        v = torch.cat([x.cos(), bias.mT.expand(-1, -1, -1, 2)], dim=-1)
        return weights @ v + q.sum()

    report = check_like_eager(attend, torch.randn(3, 2, 4, 6, 8).unbind(), differentiable=3)
    assert [site.verdict for site in report.sites] == ["rewritten"]


def test_values_made_from_another_attention_come_before_it_is_used() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        v = (k @ q.mT).softmax(-1) @ v
        return weights @ v

    report = check_like_eager(attend, torch.randn(3, 2, 4, 6, 8).unbind(), differentiable=3)
    assert [site.verdict for site in report.sites] == ["rewritten", "rewritten"]
