"""Spellings of softmax attention: each is read, checked in fp64, rewritten, and computes what eager computes."""

import pytest
from compiling import check_like_eager
from spellings import FIXED, SPELLINGS, Spelling


def line(spelling: Spelling, *, with_scale: bool) -> str:
    """The spec as the report prints it."""
    biases = {0: "", 1: "bias"}.get(spelling.biases, f"bias x{spelling.biases}")
    parts = (
        "softmax",
        f"scale={spelling.scale:.6g}" if with_scale else "",
        f"gqa={spelling.share}" if spelling.share != 1 else "",
        spelling.mask,
        f"empty={spelling.empty_row}" if spelling.empty_row != "never" else "",
        biases,
        f"softcap={spelling.softcap:g}" if spelling.softcap else "",
    )
    return " ".join(filter(None, parts))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_read_and_computes_what_eager_computes(spelling: Spelling) -> None:
    report = check_like_eager(spelling.attend, spelling.inputs(), differentiable=spelling.differentiable)
    (site,) = report.attention
    assert (site.verdict, site.spec) == (spelling.verdict, line(spelling, with_scale=True)), site.reason
    assert site.verdict == "kept" or (site.error is not None and site.error <= 1e-9)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_a_spelling_is_read_with_symbolic_sizes(spelling: Spelling) -> None:
    report = check_like_eager(spelling.attend, spelling.inputs(), dynamic=None, fixed=FIXED)
    (site,) = report.attention
    found = " ".join(word for word in site.spec.split() if not word.startswith("scale="))  # a size may be part of it
    assert (site.verdict, found) == (spelling.verdict, line(spelling, with_scale=False)), site.reason
    assert site.verdict == "kept" or (site.error is not None and site.error <= 1e-9)
