"""A scale may be a tensor: https://github.com/pytorch/pytorch/issues/191203, 100027."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor, nn


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (4, 1, 1), (4, 7, 1), (2, 1, 1, 1)])
@pytest.mark.parametrize("divided", [True, False])
def test_a_scale_that_does_not_vary_with_the_keys_is_read(shape: tuple[int, ...], *, divided: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        scores = q @ k.mT
        return (scores / scale if divided else scores * scale).softmax(-1) @ v

    inputs = (*torch.randn(3, 2, 4, 7, 8), torch.rand(shape) + 0.5)
    report = check_like_eager(attend, inputs, differentiable=4)
    assert [site.verdict for site in report.sites] == ["rewritten"]


class Learned(nn.Module):
    """Attention at a temperature that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT) * self.temperature).softmax(-1) @ v


def test_a_learned_scale_gets_its_gradient() -> None:
    model, inputs = Learned(), torch.randn(3, 2, 4, 7, 8).unbind()
    model(*inputs).square().sum().backward()
    wanted, model.temperature.grad = model.temperature.grad, None
    torch.compile(model, backend="attnopt", options={"inner": "aot_eager"})(*inputs).square().sum().backward()
    torch.testing.assert_close(model.temperature.grad, wanted)
