"""Spellings of softmax attention: each is read, checked in fp64, rewritten, and computes what eager computes."""

import pytest
from compiling import check_like_eager
from spellings import FIXED, SPELLINGS, Spelling


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_read_and_computes_what_eager_computes(spelling: Spelling) -> None:
    report = check_like_eager(spelling.attend, spelling.inputs(), differentiable=spelling.differentiable)
    (site,) = report.attention
    assert (site.verdict, site.spec) == (spelling.verdict, spelling.line(symbolic=False)), site.reason
    assert site.verdict == "kept" or (site.error is not None and site.error <= 1e-9)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_read_with_symbolic_sizes(spelling: Spelling) -> None:
    report = check_like_eager(spelling.attend, spelling.inputs(), dynamic=None, fixed=FIXED)
    (site,) = report.attention
    found = " ".join(word for word in site.spec.split() if not word.startswith("scale="))
    assert (site.verdict, found) == (spelling.verdict, spelling.line(symbolic=True)), site.reason
    assert site.verdict == "kept" or (site.error is not None and site.error <= 1e-9)
