"""Attention of reference code: each spelling is read as what it means, and its near misses compute the same."""

import re

import pytest
import torch
from beside_spellings import BESIDE
from compiling import check_like_eager
from model_code_spellings import MODEL_NEAR_MISSES, MODELS, above, one_key_head
from near_misses import NearMiss
from spellings import FIXED, SK, Spelling
from torch import Tensor


def _fixed(spelling: Spelling) -> set[int]:
    """Sizes that stay numbers: some programs write the number of keys down."""
    return {*FIXED, SK} if spelling in BESIDE else {*FIXED}


@pytest.mark.parametrize("spelling", [*MODELS, *BESIDE], ids=lambda s: s.name)
def test_a_spelling_is_read_and_computes_what_eager_computes(spelling: Spelling) -> None:
    report = check_like_eager(spelling.attend, spelling.inputs(), differentiable=spelling.differentiable)
    (site,) = report.attention
    assert (site.verdict, site.spec) == ("rewritten", spelling.line(symbolic=False)), site.reason
    assert site.error is not None
    assert site.error <= 1e-9


@pytest.mark.parametrize("spelling", [*MODELS, *BESIDE], ids=lambda s: s.name)
def test_a_spelling_is_read_with_symbolic_sizes(spelling: Spelling) -> None:
    report = check_like_eager(spelling.attend, spelling.inputs(), dynamic=None, fixed=_fixed(spelling))
    (site,) = report.attention
    found = " ".join(word for word in site.spec.split() if not word.startswith("scale="))
    assert (site.verdict, found) == ("rewritten", spelling.line(symbolic=True)), site.reason


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("miss", MODEL_NEAR_MISSES, ids=lambda m: m.name)
def test_a_near_miss_is_left_alone_or_computes_the_same(miss: NearMiss, *, dynamic: bool) -> None:
    report = check_like_eager(miss.attend, miss.inputs(), differentiable=2, dynamic=dynamic)
    if miss.reason:
        assert report.having("rewritten", "kept") == ()
        assert any(re.search(miss.reason, site.reason) for site in report.sites), report.sites


def test_keys_are_repeated_where_the_number_of_heads_is_symbolic() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bihd,bjd->bhij", q, k) + above(q.shape[1])
        return torch.einsum("bhij,bjd->bihd", scores.softmax(-1), v)

    report = check_like_eager(attend, one_key_head(), differentiable=3, dynamic=True)
    (site,) = report.attention
    assert (site.verdict, site.spec.split("=")[0], "gqa" in site.spec) == (
        "rewritten",
        "softmax scale",
        False,
    )
    assert "causal" in site.spec


class CausalBuffer(torch.nn.Module):
    """Attention behind a cache whose mask is a slice of a longer triangle that the module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tril(torch.ones(32, 32, dtype=torch.bool)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, columns = q.shape[2], k.shape[2]
        seen = self.seen[columns - rows : columns, :columns]
        return torch.where(seen, q @ k.mT, -torch.inf).softmax(-1) @ v


def test_guards_tell_where_a_slice_begins() -> None:
    q, k, v = (torch.randn(2, 4, n, 16) for n in (5, 9, 9))
    report = check_like_eager(CausalBuffer(), (q, k, v), dynamic=True)
    (site,) = report.attention
    assert (site.verdict, "causal(Sk-Sq)" in site.spec) == ("rewritten", True), site.spec
