"""Near misses of scores of several products, and of queries switched off afterwards, stay right."""

import re

import pytest
import torch
from beside_spellings import BESIDE_NEAR_MISSES, IN_PLACE_NEAR_MISSES
from compiling import check_like_eager
from near_misses import NearMiss
from spellings import SK, SQ, B, D, H, draw
from torch import Tensor

import attnopt


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("miss", [*BESIDE_NEAR_MISSES, *IN_PLACE_NEAR_MISSES], ids=lambda m: m.name)
def test_a_near_miss_is_left_alone_or_computes_the_same(miss: NearMiss, *, dynamic: bool) -> None:
    differentiable = 0 if miss in IN_PLACE_NEAR_MISSES else 2
    report = check_like_eager(miss.attend, miss.inputs(), differentiable=differentiable, dynamic=dynamic)
    if miss.reason:
        assert report.having("rewritten", "kept") == ()
        assert any(re.search(miss.reason, site.reason) for site in report.sites), report.sites


def test_keys_are_tiled_for_each_query_head() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.tile(H, 1, 1).mT).softmax(-1) @ v.tile(1, H, 1, 1)

    report = check_like_eager(
        attend, (draw(B, H, SQ, D), draw(1, SK, D), draw(B, 1, SK, D)), differentiable=3
    )
    (site,) = report.attention
    assert (site.verdict, site.spec) == ("rewritten", f"softmax scale=1 gqa={H} full"), site.reason


def test_a_mask_of_numbers_that_a_module_holds_says_what_to_write() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT * keep - 1e9 * (1 - keep)).softmax(-1) @ v  # LogTrans

    keep = torch.rand(SQ, SK).round()
    report = check_like_eager(attend, (draw(B, SQ, D), draw(B, SK, D), draw(B, SK, D), keep))
    (site,) = report.having("refused")
    assert "scores.masked_fill(mask == 0" in site.reason
    assert attnopt.reports()[-1].warnings == ()
