"""Gated and other further forms of linear attention: read, rewritten, equal to eager; also with symbolic sizes."""

import linear_gated_spellings
import pytest
from compiling import check_like_eager
from linear_gated_spellings import GATED
from linear_spellings import FIXED, S, Spelling

#: Positions that the spelling itself writes down as a number.
FIXED_LENGTH = {"tokens_first_all_in_one_einsum"}


@pytest.mark.parametrize("case", GATED, ids=lambda s: s.name)
def test_a_spelling_is_read_and_computes_what_eager_computes(case: Spelling) -> None:
    inputs = case.inputs()
    report = check_like_eager(case.attend, inputs, differentiable=len(inputs), inner="aot_eager")
    (site,) = report.attention
    found = (site.family, site.verdict, site.kernel, site.spec)
    assert found == ("linear", "rewritten", "lightning", case.spec), site.reason
    assert site.error is not None
    assert site.error <= 1e-9


@pytest.mark.parametrize("case", GATED, ids=lambda s: s.name)
def test_a_spelling_is_read_with_symbolic_sizes(case: Spelling) -> None:
    fixed = FIXED | {S} if case.name in FIXED_LENGTH else FIXED
    report = check_like_eager(case.attend, case.inputs(), dynamic=None, fixed=fixed)
    (site,) = report.attention
    assert (site.verdict, site.spec) == ("rewritten", case.spec), site.reason


def test_there_are_many() -> None:
    assert len(GATED) >= 30
    assert all(hasattr(linear_gated_spellings, case.name) for case in GATED)
