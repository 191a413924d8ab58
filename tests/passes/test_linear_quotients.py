"""Running sums of keys times values, divided by a sum beside them: the site is what is divided; the rest stays."""

import pytest
from compiling import check_like_eager
from linear_quotient_spellings import NEAR, QUOTIENTS
from linear_spellings import FIXED, NearMiss, Spelling


@pytest.mark.parametrize("case", QUOTIENTS, ids=lambda s: s.name)
def test_a_spelling_is_read_and_computes_what_eager_computes(case: Spelling) -> None:
    report = check_like_eager(case.attend, case.inputs(), differentiable=3, inner="aot_eager")
    (site,) = report.attention
    assert (site.verdict, site.kernel, site.spec) == ("rewritten", "lightning", case.spec), site.reason
    assert site.error is not None
    assert site.error <= 1e-9


@pytest.mark.parametrize("case", QUOTIENTS, ids=lambda s: s.name)
def test_a_spelling_is_read_with_symbolic_sizes(case: Spelling) -> None:
    report = check_like_eager(case.attend, case.inputs(), dynamic=None, fixed=FIXED)
    (site,) = report.attention
    assert (site.verdict, site.spec) == ("rewritten", case.spec), site.reason


@pytest.mark.parametrize("case", NEAR, ids=lambda case: case.name)
def test_a_near_miss_is_left_as_it_is(case: NearMiss) -> None:
    report = check_like_eager(case.attend, case.inputs(), differentiable=3)
    found = [site for site in report.sites if site.family == "linear"]
    assert [site.verdict for site in found] == ["refused"] * bool(case.reason), [s.spec for s in found]
    assert all(case.reason in site.reason for site in found), [site.reason for site in found]
