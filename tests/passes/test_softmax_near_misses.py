"""Near misses: left alone for the stated reason, and the compiled function still computes what eager computes."""

import re

import pytest
from compiling import check_like_eager
from near_misses import NEAR_MISSES, NearMiss


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("miss", [m for m in NEAR_MISSES if m.reason], ids=lambda m: m.name)
def test_a_near_miss_is_left_alone_for_its_reason(miss: NearMiss, *, dynamic: bool) -> None:
    report = check_like_eager(miss.attend, miss.inputs(), dynamic=dynamic)
    assert report.having("rewritten", "kept") == ()
    assert any(re.search(miss.reason or "", site.reason) for site in report.sites), report.sites


@pytest.mark.parametrize("miss", [m for m in NEAR_MISSES if not m.reason], ids=lambda m: m.name)
def test_what_may_be_read_as_attention_computes_the_same(miss: NearMiss) -> None:
    check_like_eager(miss.attend, miss.inputs(), differentiable=2)
