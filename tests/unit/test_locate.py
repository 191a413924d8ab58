"""Sites are named by the user's line and module, and only what stands like attention is called refused."""

import pytest
import torch
from compiling import compiled
from graphs import nodes_of, shadow_of
from torch import Tensor, nn

from attnopt import reports
from attnopt.locate import is_attention_shaped

aten = torch.ops.aten


class Inner(nn.Module):
    """Attention at a known line."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT, -1)
        return weights @ v


class Outer(nn.Module):
    """With a module path to it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Inner(), Inner()])

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for layer in self.layers:
            q = layer(q, k, v)
        return q


def test_a_site_has_the_line_of_its_result_and_the_path_of_its_module() -> None:
    compiled(Outer())(*torch.randn(3, 2, 4, 6, 8))
    line = Inner.forward.__code__.co_firstlineno + 2
    sites = reports()[-1].sites
    assert [site.module for site in sites] == ["layers.0", "layers.1"]
    assert {(site.where, site.code) for site in sites} == {(f"test_locate.py:{line}", "return weights @ v")}


def softmax_of(function: object, *inputs: Tensor) -> bool:
    shadow = shadow_of(function, *inputs)
    (node,) = nodes_of(shadow.module, aten.softmax.int)
    return is_attention_shaped(shadow, node)


@pytest.mark.parametrize(
    ("function", "shaped"),
    [
        (lambda q, k, v: (q @ k.mT).softmax(-1) @ v, True),
        (lambda q, k, v: ((q @ k.mT) ** 2).sin().softmax(-1).relu() @ v, True),
        (lambda q, k, v: (q @ k.mT).softmax(-1) + v.sum(), False),
        (lambda q, k, v: q.softmax(-1) @ k.mT @ v, False),
        (lambda q, k, v: q.softmax(-1), False),
    ],
)
def test_attention_has_a_product_of_activations_before_and_behind(function: object, *, shaped: bool) -> None:
    assert softmax_of(function, *torch.randn(3, 2, 4, 6, 8)) == shaped


def test_a_product_with_a_weight_does_not_count() -> None:
    def gated(x: Tensor, gate: Tensor, out: Tensor) -> Tensor:
        return (x @ gate).softmax(-1) @ out

    assert not softmax_of(gated, torch.randn(2, 6, 8), torch.randn(8, 5), torch.randn(5, 3))


def test_where_torch_itself_makes_the_call_the_line_is_the_users() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = nn.functional.threshold(q @ k.mT, 0.1, -5.0)  # calls the operator in torch/nn/functional.py
        return scores.softmax(-1) @ v

    compiled(attend)(*torch.randn(3, 2, 4, 6, 8))
    (site,) = reports()[-1].sites
    assert site.where == f"test_locate.py:{attend.__code__.co_firstlineno + 1}"
    assert site.code.startswith("scores = nn.functional.threshold(")
