"""Linear attention: each spelling is read, checked in fp64, rewritten, and computes what eager computes."""

import linear_near_misses  # noqa: F401 - registers them
import pytest
from compiling import check_like_eager
from linear_spellings import FIXED, NEAR_MISSES, SPELLINGS, NearMiss, Spelling


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_read_and_computes_what_eager_computes(spelling: Spelling) -> None:
    inputs = spelling.inputs()
    differentiable = sum(x.is_floating_point() for x in inputs)
    report = check_like_eager(spelling.attend, inputs, differentiable=differentiable, inner="aot_eager")
    (site,) = report.attention
    assert (site.family, site.verdict, site.kernel, site.spec) == (
        "linear",
        "rewritten",
        "lightning",
        spelling.spec,
    )
    assert site.error is not None
    assert site.error <= 1e-9


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_read_with_symbolic_sizes(spelling: Spelling) -> None:
    report = check_like_eager(spelling.attend, spelling.inputs(), dynamic=None, fixed=FIXED)
    (site,) = report.attention
    assert (site.verdict, site.spec) == ("rewritten", spelling.spec), site.reason


@pytest.mark.parametrize("case", NEAR_MISSES, ids=lambda case: case.name)
def test_a_near_miss_is_left_as_it_is(case: NearMiss) -> None:
    report = check_like_eager(case.attend, case.inputs())
    found = [site for site in report.sites if site.family == "linear"]
    assert [site.verdict for site in found] == ["refused"] * bool(case.reason)
    assert all(case.reason in site.reason for site in found)
