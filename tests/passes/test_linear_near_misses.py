"""What only looks like linear attention, or cannot be served: refused with the reason, or passed over in silence."""

import linear_near_misses  # noqa: F401 - registers them
import pytest
from compiling import check_like_eager
from linear_spellings import NEAR_MISSES, NearMiss


@pytest.mark.parametrize("case", NEAR_MISSES, ids=lambda case: case.name)
def test_a_near_miss_is_left_as_it_is(case: NearMiss) -> None:
    report = check_like_eager(case.attend, case.inputs())
    found = [site for site in report.sites if site.family == "linear"]
    assert [site.verdict for site in found] == ["refused"] * bool(case.reason)
    assert all(case.reason in site.reason for site in found)


def test_there_are_many() -> None:
    assert len(NEAR_MISSES) >= 12
