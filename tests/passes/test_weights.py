"""Between the softmax and the values: only what leaves the weights alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import check_like_eager
from graphs import reject_of
from torch import Tensor
from torch.nn.functional import dropout

Q, K, V = torch.randn(3, 2, 3, 5, 4).unbind()


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1)


def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    w = weights(q, k)
    return w @ v, w


def used_twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    w = weights(q, k)
    return w @ v, w.sum(-2)


def times_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k)
    return w @ w + v.sum()


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda q, k, v: dropout(weights(q, k), 0.1) @ v, "dropout 0.1 on the attention weights"),
        (returned, "the attention weights are returned"),
        (used_twice, "used 2 times"),
        (times_itself, "the softmax is multiplied by itself"),
        (lambda q, k, v: weights(q, k).transpose(-2, -1) @ v, "does not sum over"),
        (lambda q, k, v: weights(q, k).square() @ v, "is not understood"),
        (lambda q, k, v: weights(q, k).to(torch.int64).to(v.dtype) @ v, "is not understood"),
    ],
)
def test_weights_that_are_not_just_applied_are_refused(attend: Callable[..., Any], reason: str) -> None:
    assert reason in reject_of(attend, Q, K, V).reason


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: dropout(weights(q, k), 0.0) @ v,
        lambda q, k, v: dropout(weights(q, k), 0.5, training=False) @ v,
        lambda q, k, v: weights(q, k).to(v.dtype).contiguous() @ v,
        lambda q, k, v: torch.einsum("bhij,bhjd->bhid", weights(q, k), v),
        lambda q, k, v: (v.transpose(-2, -1) @ weights(q, k).transpose(-2, -1)).transpose(-2, -1),
    ],
)
def test_what_leaves_the_weights_alone_is_read_through(attend: Callable[..., Tensor]) -> None:
    (site,) = check_like_eager(attend, (Q, K, V), differentiable=3).attention
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=1 full")
