"""More keys than values: the library reads beyond the end, attnopt leaves it alone.

https://github.com/pytorch/pytorch/pull/193728
"""

import torch
from graphs import reject_of
from torch import Tensor
from torch.nn import functional


def test_keys_and_values_of_different_lengths_are_refused() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v)

    reject = reject_of(attend, torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 5, 8))
    assert "do not fit" in reject.reason
