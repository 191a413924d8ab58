"""What only looks like gated linear attention: refused with the reason, or passed over in silence, and never wrong."""

import pytest
from compiling import check_like_eager
from linear_gated_near_misses import NEAR
from linear_spellings import NearMiss


@pytest.mark.parametrize("case", NEAR, ids=lambda case: case.name)
def test_a_near_miss_is_left_as_it_is(case: NearMiss) -> None:
    report = check_like_eager(case.attend, case.inputs())
    found = [site for site in report.sites if site.family == "linear"]
    assert [site.verdict for site in found] == ["refused"] * bool(case.reason), [s.spec for s in found]
    assert all(case.reason in site.reason for site in found), [site.reason for site in found]
    assert all("near_misses.py" in site.where for site in found)


def test_there_are_many() -> None:
    assert len(NEAR) >= 25
