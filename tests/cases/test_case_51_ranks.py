"""Two to six dimensions, forwards and backwards: https://github.com/linkedin/Liger-Kernel/issues/1375."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


@pytest.mark.parametrize(
    "leading", [(), (3,), (2, 3), (2, 1, 3), (2, 3, 2), (1, 1), (2, 3, 2, 2), (1, 2, 1, 3)]
)
def test_any_number_of_leading_dimensions_is_read(leading: tuple[int, ...]) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(5, 6, dtype=torch.bool).triu(2)
        return (q @ k.transpose(-1, -2) * 0.5).masked_fill(hidden, float("-inf")).softmax(-1) @ v

    inputs = (torch.randn(*leading, 5, 8), torch.randn(*leading, 6, 8), torch.randn(*leading, 6, 4))
    report = check_like_eager(attend, inputs, differentiable=3)
    assert [site.verdict for site in report.sites] == ["rewritten"]
