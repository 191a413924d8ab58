"""`scores * m + number * (1 - m)` is a fill, where m is proven to hold zeros and ones; near misses are not."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

from attnopt.report import SiteReport

Q, K, V = (torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
Blend = Callable[[Tensor, Tensor], Tensor]


def site_of(blend: Blend, *, differentiable: int = 3, dynamic: bool = False) -> SiteReport:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.ones(q.shape[2], k.shape[2]).tril().view(1, 1, q.shape[2], k.shape[2])
        return blend(q @ k.mT * 0.25, mask).softmax(-1) @ v

    (site,) = check_like_eager(function, (Q, K, V), differentiable=differentiable, dynamic=dynamic).sites
    return site


SPELLINGS: dict[str, Blend] = {
    "added": lambda w, m: w * m + -1e10 * (1 - m),
    "subtracted": lambda w, m: w * m - 1e10 * (1 - m),
    "mask first": lambda w, m: m * w + (m - 1) * 1e10,
    "number first": lambda w, m: (1 - m) * -1e30 + m * w,
    "masks of booleans": lambda w, m: w * (m > 0) - 1e10 * (m == 0),
}


@pytest.mark.parametrize(("differentiable", "dynamic"), [(0, False), (3, False), (3, True)])
@pytest.mark.parametrize("name", SPELLINGS)
def test_a_blend_is_a_fill(name: str, differentiable: int, dynamic: bool) -> None:
    site = site_of(SPELLINGS[name], differentiable=differentiable, dynamic=dynamic)
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=0.25 causal")


def test_a_blend_with_a_number_that_weighs_is_a_fill_with_it() -> None:
    site = site_of(lambda w, m: w * m - 1e4 * (1 - m), differentiable=3)
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=0.25 causal hidden=-10000")


def test_what_multiplies_both_scales_both() -> None:
    assert site_of(lambda w, m: (w * m - 1e10 * (1 - m)) * 0.5).spec == "softmax scale=0.125 causal"


def test_what_is_added_afterwards_stays() -> None:
    site = site_of(lambda w, m: w * m - 1e10 * (1 - m) + torch.ones(7, 7).cumsum(-1).sin())
    assert site.spec == "softmax scale=0.25 causal bias"


NEAR_MISSES: dict[str, tuple[Blend, str]] = {
    "another mask": (lambda w, m: w * m - 1e10 * (1 - m.mT), "varies along the keys"),
    "the same side": (lambda w, m: w * m - 1e10 * m, "varies along the keys"),
    "the mask alone": (lambda w, m: w * m, "varies along the keys"),
    "not ones": (lambda w, m: w * (2 * m) - 1e10 * (1 - m), "varies along the keys"),
    "scaled by it later": (lambda w, m: (w - 1e10 * (1 - m)) * m, "varies along the keys"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_refused(name: str) -> None:
    blend, reason = NEAR_MISSES[name]
    site = site_of(blend)
    assert site.verdict == "refused"
    assert reason in site.reason
