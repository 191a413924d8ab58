"""Factors of the scores, and fills that weigh: what queries and keys are multiplied with instead."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import reject_of, site_of
from torch import Tensor

from attnopt.passes.site import Operand

Q, K, V = torch.randn(3, 2, 3, 7, 4).unbind()
KEEP = torch.tensor([[True] * 5 + [False] * 2, [False] * 7])  # the second sequence sees nothing


def attention(change: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, *more: change(q @ k.transpose(-2, -1), *more).softmax(-1) @ v


def factors(change: Callable[..., Tensor], *more: Tensor) -> tuple[int, int]:
    """How many factors the queries and the keys get."""
    operands = site_of(attention(change), Q, K, V, *more).operands
    q, k = operands["q"], operands["k"]
    assert isinstance(q, Operand)
    assert isinstance(k, Operand)
    return len(q.times), len(k.times)


def test_a_factor_goes_where_it_varies() -> None:
    assert factors(lambda s, t: s * t, torch.rand(7, 1)) == (1, 0)
    assert factors(lambda s, t: s / t, torch.rand(3, 1, 1)) == (1, 0)
    assert factors(lambda s, t: s * t, torch.rand(2, 1, 1, 7)) == (0, 1)
    assert factors(lambda s, a, b: s / (a * b), torch.rand(7, 1), torch.rand(7)) == (1, 1)


@pytest.mark.parametrize("shape", [(7, 7), (3, 7, 7)])
def test_a_factor_of_single_pairs_is_refused(shape: tuple[int, ...]) -> None:
    reject = reject_of(attention(lambda s, t: s * t), Q, K, V, torch.rand(shape))
    assert "varies along the keys" in reject.reason


@pytest.mark.parametrize("value", [-1e4, -3.0, 0.0, 5.0])
def test_a_fill_of_keys_that_weighs_is_a_bias_and_keys_of_zeros(value: float) -> None:
    def change(scores: Tensor, keep: Tensor) -> Tensor:
        return scores.masked_fill(~keep[:, None, None], value)

    assert factors(change, KEEP) == (0, 1)
    (site,) = check_like_eager(attention(change), (Q, K, V, KEEP), differentiable=3).attention
    assert site.verdict == "rewritten"


def test_keys_that_are_not_numbers_do_not_show_under_a_fill() -> None:
    keys = K.clone()
    keys[0, :, 5:] = torch.nan
    check_like_eager(
        attention(lambda s, keep: s.masked_fill(~keep[:, None, None], -50.0)), (Q, keys, V, KEEP)
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda s, keep: (
            s.masked_fill(~keep[:, None, None].expand(2, 1, 7, 7).tril(), -50.0) + torch.arange(7.0)
        ),
        lambda s, keep: s.masked_fill(~keep[:, None, None], torch.nan),
    ],
)
def test_a_fill_that_is_neither_the_first_nor_the_last_or_no_number_is_refused(
    change: Callable[..., Tensor],
) -> None:
    assert "still weighs" in reject_of(attention(change), Q, K, V, KEEP).reason
