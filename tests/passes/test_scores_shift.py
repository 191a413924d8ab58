"""What is the largest of a row, and what only looks like it."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import site_of
from torch import Tensor

Q, K, V = torch.randn(3, 2, 3, 7, 4).unbind()


def less(top: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Softmax attention whose scores are lowered by `top` of them."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        return (scores - top(scores)).softmax(-1) @ v

    return attend


@pytest.mark.parametrize(
    "top",
    [
        lambda s: s.amax(-1, keepdim=True),
        lambda s: s.amax(dim=(3,), keepdim=True).detach(),
        lambda s: s.detach().amax(-1, keepdim=True),
        lambda s: s.max(-1, keepdim=True).values,
        lambda s: s.max(dim=-1)[0].unsqueeze(-1),
        lambda s: s.max(3)[0][..., None].detach(),
        lambda s: s.clone().amax(3).unsqueeze(3),
        lambda s: s.max(-1, keepdim=True)[0].expand_as(s),
        lambda s: s.amax(-1, keepdim=True).expand(s.shape),
    ],
)
def test_the_largest_of_a_row_drops_out(top: Callable[[Tensor], Tensor]) -> None:
    assert site_of(less(top), Q, K, V).spec.bias == ()
    (site,) = check_like_eager(less(top), (Q, K, V), differentiable=3).attention
    assert site.verdict == "rewritten"


@pytest.mark.parametrize(
    "top",
    [
        lambda s: s.amax(-2, keepdim=True),
        lambda s: s.amax((-1, -2), keepdim=True),
        lambda s: s.max(-2)[0].unsqueeze(-1),
        lambda s: s.max(-1)[0].unsqueeze(-2),
        lambda s: s.max(-1, keepdim=True).indices,
        lambda s: s.abs().amax(-1, keepdim=True),
        lambda s: s.amin(-1, keepdim=True),
        lambda s: s[..., :3].amax(-1, keepdim=True),
        lambda s: s.amax(-2, keepdim=True).expand_as(s),
    ],
)
def test_anything_else_stays_a_bias(top: Callable[[Tensor], Tensor]) -> None:
    assert site_of(less(top), Q, K, V).spec.bias == ("bias",)
    check_like_eager(less(top), (Q, K, V), differentiable=3)
