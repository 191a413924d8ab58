"""Linear attention: each spelling is read, checked in fp64, rewritten, and computes what eager computes."""

import pytest
from compiling import check_like_eager
from linear_spellings import SPELLINGS, Spelling


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
