"""What casts do to a logit that hides a key."""

import math

import pytest
import torch

from attnopt.passes.terms import Cast, held_as


@pytest.mark.parametrize("value", [-1e9, -1e38, -3.0, -math.inf])
def test_without_casts_a_hidden_logit_is_held_as_it_is(value: float) -> None:
    assert held_as(value, ()) == value


@pytest.mark.parametrize(
    ("value", "dtype", "held"),
    [
        (-1e9, torch.float16, -math.inf),
        (-60000.0, torch.float16, -60000.0),
        (-1e9, torch.bfloat16, -1e9),
        (-1e39, torch.float32, -math.inf),
        (-1e39, torch.float64, -1e39),
    ],
)
def test_a_logit_that_does_not_fit_the_type_becomes_minus_infinity(
    value: float, dtype: torch.dtype, held: float
) -> None:
    assert held_as(value, (Cast(dtype, 1.0),)) == held


def test_what_a_cast_must_hold_is_the_logit_before_the_scale_that_follows_it() -> None:
    assert held_as(-1e5, (Cast(torch.float16, 10.0),)) == -1e5
    assert held_as(-1e4, (Cast(torch.float16, 0.1),)) == -math.inf


def test_one_cast_that_does_not_hold_it_is_enough() -> None:
    casts = (Cast(torch.float64, 1.0), Cast(torch.float16, 1.0), Cast(torch.float32, 1.0))
    assert held_as(-1e9, casts) == -math.inf
