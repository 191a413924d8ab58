"""A decay rebuilt from the number of the layer differs from model to model (fla/ops/lightning_attn/chunk.py)."""

import torch
from compiling import check_like_eager, compiled
from torch import Tensor, nn


class Layer(nn.Module):
    """Slopes as MiniMax has them, or any others: they are a buffer."""

    def __init__(self, number: int, layers: int, heads: int = 4) -> None:
        super().__init__()
        slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)
        self.register_buffer("slopes", slopes * (1 - number / (layers - 1) + 1e-5))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        return (q @ k.mT * torch.exp(-self.slopes.to(q.dtype)[:, None, None] * at).tril()) @ v


def test_each_layer_has_its_own_slopes() -> None:
    for number in range(3):
        report = check_like_eager(Layer(number, 3), torch.randn(3, 2, 4, 19, 8).unbind())
        assert [site.kernel for site in report.attention] == ["lightning"]


def test_slopes_that_change_later_are_followed() -> None:
    layer, inputs = Layer(0, 3), torch.randn(3, 2, 4, 19, 8).unbind()
    run = compiled(layer)
    run(*inputs)
    layer.slopes.mul_(3)
    torch.testing.assert_close(run(*inputs), layer(*inputs))
