"""Between the softmax and the values: only what leaves the weights alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import check_like_eager
from graphs import nodes_of, reject_of, shadow_of, site_of
from torch import Tensor
from torch.nn.functional import dropout

from attnopt.passes.layout import Space
from attnopt.passes.sizes import shape_of
from attnopt.passes.weights import Change, read_weights

Q, K, V = torch.randn(3, 2, 3, 5, 4).unbind()


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1)


def returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    w = weights(q, k)
    return w @ v, w


def used_twice(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    w = weights(q, k)
    return w @ v, w.sum(-2)


@pytest.mark.parametrize("attend", [returned, used_twice])
def test_weights_that_are_needed_elsewhere_are_read_and_named(attend: Callable[..., Any]) -> None:
    site = site_of(attend, Q, K, V)
    assert "so they must be computed anyway" in site.needless


@pytest.mark.parametrize(
    ("attend", "change"),
    [
        (lambda q, k, v: (weights(q, k) * 2.0 / 4.0) @ v, Change(factor=0.5)),
        (lambda q, k, v: -(weights(q, k) * 2.0) @ v, Change(factor=-2.0)),
        (lambda q, k, v: dropout(weights(q, k), 0.1) @ v, Change(dropout=0.1)),
        (lambda q, k, v: weights(q, k).nan_to_num() @ v, Change(zeroed=True)),
    ],
)
def test_what_becomes_of_the_weights_is_noted(attend: Callable[..., Tensor], change: Change) -> None:
    shadow = shadow_of(attend, Q, K, V)
    (softmax,) = nodes_of(shadow.module, torch.ops.aten.softmax.int)
    space = Space()
    dims = tuple(space.fresh(size) for size in shape_of(softmax))
    assert read_weights(space, shadow, softmax, dims, dims[-1]).change == change


def times_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = weights(q, k)
    return w @ w + v.sum()


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (
            lambda q, k, v: dropout(dropout(weights(q, k), 0.1), 0.1) @ v,
            "dropout twice on the attention weights",
        ),
        (lambda q, k, v: weights(q, k).sum() + v.sum(), "is not understood"),
        (lambda q, k, v: (weights(q, k), v.sum())[0], "returned by the graph, and weighs no values"),
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
