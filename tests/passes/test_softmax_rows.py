"""Queries that come as rows and columns of an image are one axis; grouped heads, and what masks tell apart, are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

B, C, H, W = 2, 8, 3, 5
MAPS = tuple(torch.randn(3, B, C, H, W, generator=torch.Generator().manual_seed(0)).unbind())


def one_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Over all places of an image, with the values first: Rombach et al. (2022), arXiv 2112.10752."""
    b, c, h, w = q.shape
    weights = torch.bmm(q.reshape(b, c, h * w).permute(0, 2, 1), k.reshape(b, c, h * w)).mul(0.25).softmax(2)
    return torch.bmm(v.reshape(b, c, h * w), weights.permute(0, 2, 1)).reshape(b, c, h, w)


def several_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, c, h, w = q.shape
    q, k, v = (x.reshape(b, 2, c // 2, h * w) for x in (q, k, v))
    weights = torch.einsum("bhdi,bhdj->bhij", q * 0.5, k).softmax(-1)
    return torch.einsum("bhij,bhdj->bhid", weights, v).transpose(2, 3).reshape(b, c, h, w)


def with_a_bias_of_places(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, c, h, w = q.shape
    bias = torch.linspace(-1, 1, (h * w) ** 2).view(h * w, h * w)
    scores = q.flatten(2).mT @ k.flatten(2) + bias
    return (scores.softmax(-1) @ v.flatten(2).mT).mT.reshape(b, c, h, w)


@pytest.mark.parametrize(
    ("attend", "spec"),
    [
        (one_head, "softmax scale=0.25 full"),
        (several_heads, "softmax scale=0.5 full"),
        (with_a_bias_of_places, "softmax scale=1 full bias"),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_rows_and_columns_are_one_axis(attend: Callable[..., Tensor], spec: str, dynamic: bool) -> None:
    report = check_like_eager(attend, MAPS, dynamic=dynamic)
    assert [(site.verdict, site.spec) for site in report.sites] == [("rewritten", spec)]


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three query heads for each of two key heads, side by side with the queries."""
    q = q.view(2, 5, 2, 3, 4).permute(0, 2, 3, 1, 4).reshape(2, 2, 15, 4)
    return (q @ k.mT).softmax(-1) @ v


def test_grouped_heads_stay_heads() -> None:
    q, k, v = torch.randn(2, 5, 24), *torch.randn(2, 2, 2, 7, 4).unbind()
    report = check_like_eager(grouped, (q, k, v))
    assert [site.spec for site in report.sites] == ["softmax scale=1 gqa=3 full"]


def seen_by_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A column sees the first keys only; rows are heads to it."""
    b, c, h, w = q.shape
    keep = torch.ones(w, h * w, dtype=torch.bool).tril()
    scores = (q.reshape(b, c, h * w).mT @ k.flatten(2)).view(b, h, w, h * w)
    weights = scores.masked_fill(~keep, -torch.inf).view(b, h * w, h * w).softmax(-1)
    return weights @ v.flatten(2).mT


def times_a_number_for_each_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, c, h, w = q.shape
    weights = (q.reshape(b, c, h * w).mT @ k.flatten(2)).softmax(-1).view(b, h, w, h * w)
    scaled = weights * torch.linspace(0.5, 1.5, h)[:, None, None]
    return scaled.view(b, h * w, h * w) @ v.flatten(2).mT


@pytest.mark.parametrize("attend", [seen_by_columns, times_a_number_for_each_row])
def test_what_tells_rows_and_columns_apart_is_kept(attend: Callable[..., Any]) -> None:
    (site,) = check_like_eager(attend, MAPS).sites
    assert (site.verdict, "gqa=3" in site.spec) == ("rewritten", True)
