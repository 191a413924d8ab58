"""What stands between Q K^T and the softmax: what is understood is rewritten and right, what is not is left alone."""

import re

import pytest
from compiling import check_like_eager
from near_misses import NearMiss
from score_near_misses import SCORE_NEAR_MISSES
from score_spellings import SCORE_SPELLINGS
from spellings import FIXED, Spelling


@pytest.mark.parametrize("spelling", SCORE_SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_read_and_computes_what_eager_computes(spelling: Spelling) -> None:
    report = check_like_eager(spelling.attend, spelling.inputs(), differentiable=spelling.differentiable)
    (site,) = report.attention
    assert (site.verdict, site.spec) == (spelling.verdict, spelling.line(symbolic=False)), site.reason
    assert site.error is not None
    assert site.error <= 1e-9


@pytest.mark.parametrize("spelling", SCORE_SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_read_with_symbolic_sizes(spelling: Spelling) -> None:
    report = check_like_eager(spelling.attend, spelling.inputs(), dynamic=None, fixed=FIXED)
    (site,) = report.attention
    found = " ".join(word for word in site.spec.split() if not word.startswith("scale="))
    assert (site.verdict, found) == (spelling.verdict, spelling.line(symbolic=True)), site.reason


@pytest.mark.parametrize("miss", [m for m in SCORE_NEAR_MISSES if m.reason is not None], ids=lambda m: m.name)
def test_a_near_miss_is_left_alone_for_its_reason(miss: NearMiss) -> None:
    report = check_like_eager(miss.attend, miss.inputs(), differentiable=2)
    assert report.having("rewritten", "kept") == ()
    assert any(re.search(miss.reason or "", site.reason) for site in report.sites), report.sites


@pytest.mark.parametrize("miss", [m for m in SCORE_NEAR_MISSES if m.reason is None], ids=lambda m: m.name)
def test_what_may_be_read_as_attention_computes_the_same(miss: NearMiss) -> None:
    check_like_eager(miss.attend, miss.inputs(), differentiable=2)
