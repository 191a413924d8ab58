"""NaN where no query looks: eager spreads it (0 * NaN), a kernel that skips need not; never the other way round.

The library adds a mask to the scores, and NaN - inf is NaN: NaN in a hidden key is not tried with it.

https://github.com/pytorch/pytorch/issues/101967
"""

import pytest
import torch
from compiling import compiled
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~keep[:, None, None], float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize(("kernel", "place"), [("streaming", 1), ("streaming", 2), ("sdpa", 2)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_in_eager_is_the_same_number(place: int, value: float, kernel: str) -> None:
    inputs = [*torch.randn(3, 2, 4, 6, 8), torch.arange(6).expand(2, 6) < 4]
    clean = attend(*inputs)
    inputs[place][:, :, 5, 3] = value
    out, eager = compiled(attend, allow=(kernel,))(*inputs), attend(*inputs)
    assert not bool((out.isnan() & eager.isfinite()).any())
    finite = out.isfinite()
    torch.testing.assert_close(out[finite], clean[finite])
