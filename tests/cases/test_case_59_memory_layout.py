"""What comes out is laid out as eager's: https://github.com/pytorch/pytorch/issues/130243, 177115."""

import pytest
import torch
from compiling import compiled
from torch import Tensor


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("after", ["nothing", "relu", "transpose", "residual"])
def test_a_view_after_the_graph_works_as_without_attnopt(after: str, inner: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.mT).softmax(-1) @ v
        return {"nothing": out, "relu": out.relu(), "transpose": out.transpose(1, 2), "residual": out + q}[
            after
        ]

    q, k, v = torch.randn(3, 2, 7, 4, 8).transpose(2, 3).unbind()
    out, eager = compiled(attend, inner=inner)(q, k, v), attend(q, k, v)
    assert out.stride() == eager.stride()


def test_a_view_inside_the_graph_works_as_without_attnopt() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.mT).softmax(-1) @ v
        return (out * 2).view(out.shape[0] * out.shape[1], -1)

    q, k, v = torch.randn(3, 2, 7, 4, 8).transpose(2, 3).unbind()
    torch.testing.assert_close(compiled(attend, inner="aot_eager")(q, k, v), attend(q, k, v))
