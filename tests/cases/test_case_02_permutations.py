"""No literal is a wild card, the order of dimensions least of all: https://github.com/pytorch/pytorch/pull/191260."""

from itertools import permutations

import pytest
import torch
from graphs import rewritten
from torch import Tensor


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("place", ["q", "k", "v", "weights", "out"])
def test_every_permutation_is_taken_as_it_is(place: str, order: tuple[int, ...]) -> None:
    def turned(here: str, x: Tensor) -> Tensor:
        return x.permute(order) if here == place else x

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = turned("q", q) @ turned("k", k.transpose(1, 2))
        return turned("out", turned("weights", scores.softmax(-1)) @ turned("v", v))

    inputs = torch.randn(3, 4, 4, 4, dtype=torch.float64).unbind()
    torch.testing.assert_close(rewritten(attend, *inputs)(*inputs), attend(*inputs))
