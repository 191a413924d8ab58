"""Linear attention with symbolic sizes: each spelling is read, and no size is fixed by that."""

import pytest
from compiling import check_like_eager
from linear_spellings import FIXED, SPELLINGS, Spelling


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_read_with_symbolic_sizes(spelling: Spelling) -> None:
    report = check_like_eager(spelling.attend, spelling.inputs(), dynamic=None, fixed=FIXED)
    (site,) = report.attention
    assert (site.verdict, site.spec) == ("rewritten", spelling.spec), site.reason
