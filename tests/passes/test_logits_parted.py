"""A mask that is filled into a bias is told apart from it where each query surely sees a key, and nowhere else."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

Q, K, V = (torch.randn(2, 4, 7, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
BIAS = torch.randn(2, 2, 7, 7, generator=torch.Generator().manual_seed(3))
Fill = Callable[[Tensor], Tensor]


def future(x: Tensor) -> Tensor:
    """Bool (Sq, Sk): keys behind the query."""
    return torch.ones(x.shape[-2:], dtype=torch.bool).triu(1)


def over_heads(x: Tensor, count: int) -> Tensor:
    b, h, sq, sk = x.shape
    return x[:, :, None].expand(b, h, count, sq, sk).reshape(b, h * count, sq, sk)


def attend(fill: Fill) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT * 0.25 + over_heads(fill(bias), 2)).softmax(-1) @ v

    return function


def spec_of(fill: Fill, *, differentiable: int = 0, dynamic: bool = False) -> str:
    inputs = (Q, K, V, BIAS)
    report = check_like_eager(attend(fill), inputs, differentiable=differentiable, dynamic=dynamic)
    (site,) = report.sites
    assert site.verdict in ("rewritten", "kept"), site.reason
    return site.spec


SPELLINGS: dict[str, Fill] = {
    "filled": lambda x: x.masked_fill(future(x), torch.finfo(x.dtype).min),
    "filled with -inf": lambda x: x.masked_fill(future(x), -torch.inf),
    "chosen": lambda x: torch.where(future(x), torch.finfo(x.dtype).min, x),
    "chosen the other way": lambda x: torch.where(~future(x), x, -1e9),
    "through a slice": lambda x: x.masked_fill(future(x), torch.finfo(x.dtype).min)[:, :, :, : x.shape[-1]],
    "by a float mask": lambda x: x.masked_fill(future(x).float()[None, None] != 0, torch.finfo(x.dtype).min),
}


@pytest.mark.parametrize(("differentiable", "dynamic"), [(0, False), (4, False), (0, True), (4, True)])
@pytest.mark.parametrize("name", SPELLINGS)
def test_the_mask_is_proven(name: str, differentiable: int, dynamic: bool) -> None:
    spec = spec_of(SPELLINGS[name], differentiable=differentiable, dynamic=dynamic)
    assert spec.endswith(" causal bias")


NEAR_MISSES: dict[str, Fill] = {
    "whole numbers": lambda x: (8 * x).long().masked_fill(future(x), -9),
    "a fill that weighs": lambda x: x.masked_fill(future(x), -1e4),
    "a query that sees nothing": lambda x: x.masked_fill(~future(x), torch.finfo(x.dtype).min),
    "changed afterwards": lambda x: x.masked_fill(future(x), torch.finfo(x.dtype).min) * 0.5,
    "written to afterwards": lambda x: x.masked_fill(future(x), torch.finfo(x.dtype).min).add_(1.0),
    "filled with data": lambda x: x.masked_fill(future(x), x.sum()),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay_biases(name: str) -> None:
    assert spec_of(NEAR_MISSES[name], differentiable=4).endswith(" full bias")
