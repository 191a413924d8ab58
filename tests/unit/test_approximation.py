"""The measured error of an approximate site is what the approximation costs on the example inputs."""

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.report import SiteReport

STREAMING = {"softmax": "streaming", "sinks": 1, "window": 4}


class Causal(nn.Module):
    """`layers` causal attentions, one after the other."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
        for _ in range(self.layers):
            q = (q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return q


def sites(model: nn.Module, inputs: tuple[Tensor, ...], **options: object) -> tuple[SiteReport, ...]:
    return attnopt.rewrite(torch.export.export(model, inputs), options)[1].sites


def tensors(length: int) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, 2, length, 8) for _ in range(3))


def test_the_error_is_that_of_the_site_on_the_example_inputs() -> None:
    q, k, v = tensors(16)
    (site,) = sites(Causal(), (q, k, v), **STREAMING)
    exact = Causal()(q, k, v)
    near = attnopt.ops.streaming_attention(q, k, v, sinks=1, window=4, scale=1.0)
    assert not site.exact
    assert site.approximation_error == pytest.approx(float((near - exact).norm() / exact.norm()), rel=1e-4)


def test_a_window_that_sees_everything_costs_nothing() -> None:
    (site,) = sites(Causal(), tensors(4), **STREAMING)
    assert site.approximation_error == pytest.approx(0.0, abs=1e-6)


def test_each_site_has_its_own_error_on_the_exact_values_before_it() -> None:
    found = [site.approximation_error for site in sites(Causal(layers=3), tensors(16), **STREAMING)]
    assert len(found) == 3
    assert all(error is not None and error > 1e-3 for error in found)


def test_exact_sites_have_none() -> None:
    (site,) = sites(Causal(), tensors(16))
    assert (site.exact, site.approximation_error) == (True, None)


class Branching(nn.Module):
    """Attention inside a branch, whose inputs are not the program's."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cond(q.sum() > 0, Causal(), lambda q, k, v: q + k + v, (q, k, v))


def test_a_site_inside_a_branch_is_not_measured() -> None:
    found = sites(Branching(), tensors(16), **STREAMING)
    assert [(site.verdict, site.exact, site.approximation_error) for site in found] == [
        ("rewritten", False, None)
    ]
