"""Dropout in eval is nothing, in training it is something.

https://github.com/pytorch/pytorch/pull/109118, https://github.com/facebookresearch/vjepa2/pull/160
"""

import torch
from compiling import check_like_eager, compiled
from torch import Tensor, nn
from torch.nn import functional

import attnopt


class Attention(nn.Module):
    """With a dropout that depends on the mode."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.dropout = nn.Dropout(0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5 if self.training else 0.0)
        return self.dropout((q @ k.mT).softmax(-1)) @ v


def test_dropout_in_eval_changes_nothing() -> None:
    report = check_like_eager(Attention(fused=False).eval(), torch.randn(3, 2, 6, 8).unbind())
    assert [site.verdict for site in report.sites] == ["rewritten"]


def test_dropout_in_training_is_still_there() -> None:
    for fused, verdict in ((False, "rewritten"), (True, "kept")):
        q, k, _ = torch.randn(3, 2, 6, 8).unbind()
        out = compiled(Attention(fused=fused).train())(q, k, torch.eye(6).expand(2, 6, 6))
        (site,) = attnopt.reports()[-1].sites
        assert (site.verdict, "dropout=0.5" in site.spec) == (verdict, True)
        assert 0.2 < (out == 0).float().mean() < 0.8
