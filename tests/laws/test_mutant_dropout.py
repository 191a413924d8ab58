"""Dropout may draw other random numbers, where the report says so, and excuses nothing else."""

from collections.abc import Callable

import pytest
import torch
from mutant_dropout import noted, rates, without_dropout
from mutant_programs import traced
from mutant_trials import Setting, judged
from torch import Tensor
from torch.nn import functional

from attnopt.backend import reports

HEADS = tuple(torch.randn(3, 2, 4, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * 0.25).softmax(-1)


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.dropout(weights_of(q, k), 0.5, training=True) @ v


def dropped_in_another_order(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The heads change places before the weights are dropped."""
    parted = weights_of(q, k).unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2)
    return -functional.dropout(parted, 0.5, training=True) @ v


@pytest.mark.parametrize("attend", [dropped, dropped_in_another_order])
@pytest.mark.parametrize("training", [False, True])
def test_other_random_numbers_are_no_fault(attend: Callable[..., Tensor], training: bool) -> None:
    found = judged(attend, HEADS, Setting(training=training))
    assert found.verdicts == ("softmax rewritten",)
    assert found.wrong == ""


def test_a_report_that_does_not_name_the_rate_excuses_nothing() -> None:
    graph = traced(dropped, HEADS)
    judged(dropped, HEADS, Setting())
    sites = reports()[-1].sites
    assert rates(graph) == (0.5,)
    assert noted(graph, sites)
    assert not noted(graph, ())
    assert not noted(without_dropout(graph), sites)


def test_what_drops_nothing_or_everything_is_compared_as_it_is() -> None:
    kept = traced(lambda q, k, v: functional.dropout(weights_of(q, k), 0.5, training=False) @ v, HEADS)
    nothing = traced(lambda q, k, v: functional.dropout(weights_of(q, k), 1.0, training=True) @ v, HEADS)
    assert rates(kept) == rates(nothing) == ()


def test_without_dropout_the_weights_are_kept() -> None:
    calm = without_dropout(traced(dropped, HEADS))
    torch.testing.assert_close(calm(*HEADS)[0], weights_of(*HEADS[:2]) @ HEADS[2])
