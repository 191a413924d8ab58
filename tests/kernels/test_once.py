"""A second derivative is refused by name, and the first is not touched by that."""

import pytest
import torch
from compiling import compiled
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.ops import lightning_attention, streaming_attention


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return lightning_attention(q, k, v, scale=0.25)


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return streaming_attention(q, k, v, sinks=1, window=4)


@pytest.mark.parametrize(("attend", "kernel"), [(linear, "lightning"), (softmax, "streaming")])
def test_a_gradient_penalty_says_what_to_do(attend: object, kernel: str) -> None:
    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 9, 8, dtype=torch.float64).unbind())
    (first,) = torch.autograd.grad(attend(q, k, v).square().sum(), q)
    (again,) = torch.autograd.grad(attend(q, k, v).square().sum(), q, create_graph=True)
    assert torch.equal(first, again)
    with pytest.raises(UnsupportedError, match=rf"{kernel} attention has no second derivative.*'{kernel}'"):
        again.square().sum().backward()


def test_a_site_that_is_left_alone_has_its_second_derivative() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).tril() @ v

    q, k, v = (x.requires_grad_() for x in torch.randn(3, 1, 2, 9, 8, dtype=torch.float64).unbind())
    found = []
    for run in (attend, compiled(attend, deny=("lightning",))):
        (first,) = torch.autograd.grad(run(q, k, v).square().sum(), q, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (q, k, v)))
    assert all(torch.allclose(a, b) for a, b in zip(*found, strict=True))
