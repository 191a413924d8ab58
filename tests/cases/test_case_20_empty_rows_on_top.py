"""More queries than keys, aligned at the bottom right: the first rows see nothing.

https://github.com/Dao-AILab/flash-attention/issues/1778
"""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


@pytest.mark.parametrize("fill", [float("-inf"), torch.finfo(torch.float32).min])
@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
def test_rows_without_keys_are_what_the_fill_makes_them(fill: float, kernel: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(9, 5, dtype=torch.bool).triu(5 - 9 + 1)
        return (q @ k.mT).masked_fill(hidden, fill).softmax(-1) @ v

    inputs = (torch.randn(2, 4, 9, 8), *torch.randn(2, 2, 4, 5, 8))
    report = check_like_eager(attend, inputs, allow=(kernel,))
    row = "nan" if fill == float("-inf") else "uniform"
    assert [site.spec for site in report.sites] == [f"softmax scale=1 causal(Sk-Sq) empty={row}"]
