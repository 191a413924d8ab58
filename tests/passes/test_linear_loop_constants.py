"""Masks of linear attention that are made of positions in a half type: exact as far as the type counts."""

from collections.abc import Callable

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


def loop(scaled: Callable[[Tensor, int], Tensor]) -> Callable[..., Tensor]:
    """A recurrence over six tokens, whose queries are scaled at each of them by something made of their width."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        state, out = torch.zeros(2, 3, q.shape[-1], v.shape[-1]), torch.empty_like(v)
        for t in range(6):
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            out[:, t] = torch.einsum("bhkv,bhk->bhv", state, scaled(q[:, t], q.shape[-1]))
        return out

    return attend


@pytest.mark.parametrize(
    "scaled", [lambda q, n: q * n**-0.5, lambda q, n: q / n, lambda q, n: q * n, lambda q, n: q / n**0.5]
)
def test_a_loop_that_computes_with_a_symbolic_width_is_right_at_every_width(
    scaled: Callable[[Tensor, int], Tensor],
) -> None:
    attend = loop(scaled)
    check_like_eager(attend, torch.randn(3, 2, 6, 3, 5).unbind(), fixed=(2, 6, 3))
    compiled = torch.compile(attend, backend="attnopt", options={"inner": "eager"}, dynamic=True)
    for width in (5, 7, 9, 11):
        given = torch.randn(3, 2, 6, 3, width, dtype=torch.float64).unbind()
        torch.testing.assert_close(compiled(*given), attend(*given).double())


def test_a_loop_that_only_lays_out_symbolic_sizes_is_read() -> None:
    report = check_like_eager(loop(lambda q, _: q), torch.randn(3, 2, 6, 3, 5).unbind(), fixed=(2, 6, 3))
    assert [(site.verdict, site.spec) for site in report.sites] == [("rewritten", "linear scale=1 causal")]
