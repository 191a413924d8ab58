"""The base of a decay is what cannot be negative, or a table of one number a head that comes from outside."""

from collections.abc import Callable

import pytest
import torch
from graphs import aten_graph
from torch import Tensor

from attnopt.passes.linear_sign import is_log_of_whole_numbers, is_never_negative, may_be_a_base

X = torch.randn(2, 3)


def result(function: Callable[[Tensor], Tensor], x: Tensor = X) -> torch.fx.Node:
    """The node of what the function returns."""
    (node,) = aten_graph(function, x).graph.output_node().all_input_nodes
    return node


@pytest.mark.parametrize(
    "base",
    [
        lambda x: x.sigmoid(), lambda x: 1 - x.sigmoid(), lambda x: x.exp().cumprod(-1)[:, None],
        lambda x: x.clamp(min=0.5), lambda x: x.relu() + x.square() * 2, lambda x: x.sigmoid() / 4,
        lambda x: torch.cat((x.abs(), x.softmax(-1))),
    ],
)  # fmt: skip
def test_what_cannot_be_negative(base: Callable[[Tensor], Tensor]) -> None:
    assert is_never_negative(result(base))


@pytest.mark.parametrize(
    "base",
    [
        lambda x: x.tanh(), lambda x: x.cumprod(-1), lambda x: x.sigmoid() - 0.1, lambda x: x.sigmoid() * -1.0,
        lambda x: 1 - x.exp(), lambda x: x.clamp(min=-0.5), lambda x: x.relu() + x, lambda x: x.sigmoid() + -0.5,
        lambda x: 0.5 - x.sigmoid(), lambda x: -x.sigmoid(), lambda x: x.clamp(max=0.5),
        lambda x: torch.add(x.exp(), x.exp(), alpha=-2),
    ],
)  # fmt: skip
def test_what_may_be_negative(base: Callable[[Tensor], Tensor]) -> None:
    assert not is_never_negative(result(base))


def test_a_table_from_outside_is_taken_for_bases_and_data_are_not() -> None:
    table, data = (result(lambda x: x.neg(), x).all_input_nodes[0] for x in (torch.rand(3, 1, 1), X))
    assert (may_be_a_base(table), may_be_a_base(data)) == (True, False)


@pytest.mark.parametrize(
    "decay",
    [lambda x: x.long().double().log(), lambda x: x.floor()[:, None].log().mT, lambda x: (x > 0).float().log()],
)  # fmt: skip
def test_a_logarithm_of_whole_numbers(decay: Callable[[Tensor], Tensor]) -> None:
    assert is_log_of_whole_numbers(result(decay))


@pytest.mark.parametrize(
    "decay",
    [
        lambda x: x.sigmoid().log(),
        lambda x: x.half().float().log(),
        lambda x: x.floor().exp(),
        lambda x: x.long(),
    ],
)
def test_any_other_logarithm(decay: Callable[[Tensor], Tensor]) -> None:
    assert not is_log_of_whole_numbers(result(decay))
