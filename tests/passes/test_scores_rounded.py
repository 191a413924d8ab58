"""A scale that the graph holds in a tensor counts as that tensor's dtype rounds it, for reading and for the check."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

Q, K, V = (torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(n)) for n in range(3))
Scaled = Callable[[Tensor], Tensor]

ROOT = 8**0.5
SCALES: dict[str, Scaled] = {
    "full": lambda s: s / torch.full([], ROOT, dtype=s.dtype),
    "full of one element": lambda s: s / torch.full((1,), ROOT, dtype=s.dtype),
    "full of all pairs": lambda s: s * torch.full((6, 6), 1 / ROOT, dtype=s.dtype),
    "full_like": lambda s: s * torch.full_like(s, 1 / ROOT),
    "new_full": lambda s: s * s.new_full((1,), 1 / ROOT),
    "its root": lambda s: s / torch.full([], 8.0, dtype=s.dtype).sqrt(),
    "the root of a number": lambda s: s / torch.sqrt(torch.tensor(8).to(s.dtype)),
    "its inverse root": lambda s: s * torch.full((1,), 8.0, dtype=s.dtype).rsqrt(),
    "a power": lambda s: s * torch.full((), 8.0, dtype=s.dtype) ** -0.5,
    "times ones": lambda s: s * (torch.ones((), dtype=s.dtype) / ROOT),
    "a difference": lambda s: s * (torch.full((), 1.3, dtype=s.dtype) - 0.1),
}
HALVES: dict[str, Scaled] = {
    "full in bfloat16": lambda s: s / torch.full([], ROOT, dtype=torch.bfloat16),
    "full of one element in float16": lambda s: s * torch.full((1,), 1 / ROOT, dtype=torch.float16),
    "its root in bfloat16": lambda s: s / torch.full([], 8.0, dtype=torch.bfloat16).sqrt(),
}


def attend(scaled: Scaled) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled(q @ k.mT).softmax(-1) @ v

    return function


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCALES)
def test_a_scale_in_a_tensor_is_read(name: str, dtype: torch.dtype) -> None:
    inputs = tuple(x.to(dtype) for x in (Q, K, V))
    report = check_like_eager(attend(SCALES[name]), inputs, differentiable=3)
    (site,) = report.sites
    assert site.verdict == "rewritten", site.reason
    scale = 1.2 if name == "a difference" else 1 / ROOT
    assert site.spec == f"softmax scale={scale:.6g} full"


@pytest.mark.parametrize("name", HALVES)
def test_a_scale_in_half_precision_counts_as_rounded(name: str) -> None:
    report = check_like_eager(attend(HALVES[name]), (Q, K, V), differentiable=3)
    (site,) = report.sites
    assert site.verdict == "rewritten", site.reason
    scale = float(site.spec.split("scale=")[1].split()[0])
    assert 1e-5 < abs(scale * ROOT - 1) < 4e-3


LIKE_ROOT = (6,), 1 / ROOT
VARYING: dict[str, Scaled] = {
    "overwritten": lambda s: s * torch.full(*LIKE_ROOT, dtype=s.dtype).fill_(0.5),
    "one element overwritten": lambda s: s * torch.full(*LIKE_ROOT, dtype=s.dtype).index_fill(0, torch.tensor(2), 2.0),
    "of positions": lambda s: s / torch.arange(1, 7).to(s.dtype).sqrt(),
}  # fmt: skip


@pytest.mark.parametrize("name", VARYING)
def test_a_scale_that_is_no_single_number_is_never_taken_for_one(name: str) -> None:
    report = check_like_eager(attend(VARYING[name]), (Q, K, V), differentiable=3)
    assert all("scale=0.353553" not in site.spec for site in report.having("rewritten"))
