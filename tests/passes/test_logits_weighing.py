"""Numbers that hide keys and may still weigh: one number behind everything else is stated, others are refused."""

import pytest
from compiling import check_like_eager
from spellings import FIXED
from spellings_forms import Form
from weighing_spellings import WEIGHING


def wanted(form: Form, scale: str) -> str:
    share = f"gqa={form.share}" if form.share != 1 else ""
    return " ".join(filter(None, ("softmax", scale, share, form.mask, form.sinks)))


@pytest.mark.parametrize("form", WEIGHING, ids=lambda f: f.name)
def test_a_number_that_weighs_is_stated_and_computed(form: Form) -> None:
    (site,) = check_like_eager(form.attend, form.inputs(), differentiable=form.differentiable).attention
    assert (site.verdict, site.spec) == ("rewritten", wanted(form, f"scale={form.scale:.6g}")), site.reason


@pytest.mark.parametrize("form", WEIGHING, ids=lambda f: f.name)
def test_so_it_is_with_symbolic_sizes(form: Form) -> None:
    report = check_like_eager(form.attend, form.inputs(), dynamic=None, fixed=FIXED)
    (site,) = report.attention
    found = " ".join(word for word in site.spec.split() if not word.startswith("scale="))
    assert (site.verdict, found) == ("rewritten", wanted(form, "")), site.reason
