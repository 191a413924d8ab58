"""Spellings of softmax attention: each is read, checked in fp64, rewritten, and computes what eager computes."""

import pytest
from compiling import check_like_eager
from spellings import FIXED, SPELLINGS, Spelling


def line(spelling: Spelling, *, symbolic: bool) -> str:
    """The spec as the report prints it; without the scale, of which a size may be part, where sizes are symbolic."""
    empty_row = (spelling.empty_row_symbolic if symbolic else None) or spelling.empty_row
    biases = {0: "", 1: "bias"}.get(spelling.biases, f"bias x{spelling.biases}")
    parts = (
        "softmax",
        "" if symbolic else f"scale={spelling.scale:.6g}",
        f"gqa={spelling.share}" if spelling.share != 1 else "",
        spelling.mask,
        f"empty={empty_row}" if empty_row != "never" else "",
        biases,
        f"softcap={spelling.softcap:g}" if spelling.softcap else "",
    )
    return " ".join(filter(None, parts))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_read_and_computes_what_eager_computes(spelling: Spelling) -> None:
    report = check_like_eager(spelling.attend, spelling.inputs(), differentiable=spelling.differentiable)
    (site,) = report.attention
    assert (site.verdict, site.spec) == (spelling.verdict, line(spelling, symbolic=False)), site.reason
    assert site.verdict == "kept" or (site.error is not None and site.error <= 1e-9)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_read_with_symbolic_sizes(spelling: Spelling) -> None:
    report = check_like_eager(spelling.attend, spelling.inputs(), dynamic=None, fixed=FIXED)
    (site,) = report.attention
    found = " ".join(word for word in site.spec.split() if not word.startswith("scale="))
    assert (site.verdict, found) == (spelling.verdict, line(spelling, symbolic=True)), site.reason
    assert site.verdict == "kept" or (site.error is not None and site.error <= 1e-9)
