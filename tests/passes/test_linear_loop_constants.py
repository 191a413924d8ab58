"""Masks of linear attention that are made of positions in a half type: exact as far as the type counts."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

HALVES = [torch.bfloat16, torch.float16]


def summed(n: int, dtype: torch.dtype) -> Tensor:
    ones = torch.ones(n, n, dtype=dtype)
    return ones.cumsum(-1, dtype=dtype) <= ones.cumsum(-2, dtype=dtype)


def cast(n: int, dtype: torch.dtype) -> Tensor:
    at = torch.arange(n).to(dtype)
    return at[None] <= at[:, None]


@pytest.mark.parametrize("make", [summed, cast])
@pytest.mark.parametrize("family", ["linear", "softmax"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_positions_beyond_what_a_type_counts_are_no_positions(
    make: object, family: str, *, dynamic: bool
) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = make(q.shape[2], torch.bfloat16)
        if family == "linear":
            return ((q @ k.mT) * mask) @ v
        return (q @ k.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ v

    report = check_like_eager(attend, torch.randn(3, 1, 2, 300, 4).unbind(), dynamic=dynamic)
    assert all("causal" not in site.spec for site in report.having("rewritten"))


@pytest.mark.parametrize("make", [summed, cast])
@pytest.mark.parametrize("dtype", HALVES)
def test_positions_that_a_type_counts_are_proven(make: object, dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * make(40, dtype)) @ v

    report = check_like_eager(attend, torch.randn(3, 1, 2, 40, 4).unbind())
    assert [site.spec for site in report.having("rewritten")] == ["linear scale=1 causal"]


@pytest.mark.parametrize("dtype", HALVES)
def test_positions_in_a_half_type_are_not_trusted_at_any_length(dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * summed(q.shape[2], dtype)) @ v

    report = check_like_eager(attend, torch.randn(3, 1, 2, 40, 4).unbind(), fixed=(1, 2, 4))
    assert not report.having("rewritten")
