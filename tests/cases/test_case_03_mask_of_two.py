"""`mask == 0` and `mask == 1` differ where the mask is 2; the predicate is never derived anew.

Read in https://github.com/pytorch/pytorch/blob/main/torch/_inductor/fx_passes/fuse_attention.py (patterns 15, 17).
"""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


@pytest.mark.parametrize("value", [0, 1, 2])
@pytest.mark.parametrize("equal", [True, False])
def test_the_predicate_is_the_graphs_own(value: int, *, equal: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        hidden = mask == value if equal else mask != value
        return (q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v

    mask = torch.arange(36).view(6, 6) % 3
    report = check_like_eager(attend, (*torch.randn(3, 2, 6, 8), mask))
    assert [site.verdict for site in report.sites] == ["rewritten"]
