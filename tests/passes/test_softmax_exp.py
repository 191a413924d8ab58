"""The softmax written out with exp: a sum that is not quite its own, or a maximum of something else, is left alone."""

import re
from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import found_in, site_of
from torch import Tensor

B, H, SQ, SK, D = 2, 4, 5, 9, 8


def tensors() -> tuple[Tensor, ...]:
    return torch.randn(B, H, SQ, D), torch.randn(B, H, SK, D), torch.randn(B, H, SK, D)


def exponentials(q: Tensor, k: Tensor) -> Tensor:
    return torch.exp(q @ k.mT * 0.25)


def shifted(q: Tensor, k: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25
    return torch.exp(scores - scores.amax(-1, keepdim=True))


def sum_over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k)
    return (weights / weights.sum(-2, keepdim=True)) @ v


def sum_of_others(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k)
    return (weights / exponentials(q, k * 2).sum(-1, keepdim=True)) @ v + weights.sum(-1, keepdim=True)


def sum_before_the_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k)
    seen = torch.ones(SQ, SK, dtype=torch.bool).tril(3)
    return ((weights * seen) / weights.sum(-1, keepdim=True)) @ v


def small_number_beside_a_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = shifted(q, k)
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


def bound_above_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = shifted(q, k)
    return (weights / weights.sum(-1, keepdim=True).clamp_min(2.0)) @ v


def bound_without_a_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k)
    return (weights / weights.sum(-1, keepdim=True).clamp_min(1e-6)) @ v


def squared_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k)
    return (weights / weights.sum(-1, keepdim=True) ** 2) @ v


def subtracted_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k)
    return (weights / (weights.sum(-1, keepdim=True) - 1e-3)) @ v


def two_numbers_in_the_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k)
    return (weights / (weights.sum(-1, keepdim=True) + 1.0 + weights.mean() * 0)) @ v


def weighed_exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k) * torch.arange(1.0, SK + 1, dtype=q.dtype)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def never_divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k)
    return weights @ v + weights.sum(-1, keepdim=True)


def sink_with_another_shift(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    other = torch.exp(0.5 - scores.amin(-1, keepdim=True))
    return (weights / (weights.sum(-1, keepdim=True) + other)) @ v


def column_of_twos(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = exponentials(q, k) @ torch.nn.functional.pad(v, (0, 1), value=2.0)
    return out[..., :-1] / out[..., -1:]


def column_of_ones_in_front(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = exponentials(q, k) @ torch.nn.functional.pad(v, (1, 0), value=1.0)
    return out[..., :-1] / out[..., -1:]


def first_column_as_divisor(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = exponentials(q, k) @ torch.nn.functional.pad(v, (0, 1), value=1.0)
    return out[..., :-1] / out[..., :1]


def sum_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = shifted(q, k)
    return (weights / weights.sum(-1, keepdim=True).detach()) @ v


REASONS = {
    sum_over_queries: "does not sum over",
    sum_of_others: "something other than its sum|not divided|a loop over positions",
    sum_before_the_mask: "something other than its sum|not divided|made of them",
    small_number_beside_a_maximum: "added to the sum of exponentials",
    bound_above_one: "clamped where that may change it",
    bound_without_a_maximum: "clamped where that may change it",
    squared_sum: "something other than its sum",
    subtracted_number: "something other than its sum|subtracted from the sum",
    two_numbers_in_the_sum: "added to the sum|several sinks|something other than its sum",
    weighed_exponentials: "not made of a mask",
    never_divided: "not divided by its sum",
    sink_with_another_shift: "not exp of a sink|added to the sum",
    sum_without_gradient: "something other than its sum",
}


@pytest.mark.parametrize("attend", REASONS, ids=lambda f: f.__name__)
def test_a_near_miss_is_refused_for_its_reason(attend: Callable[..., Tensor]) -> None:
    report = check_like_eager(attend, tensors(), differentiable=3)
    assert report.having("rewritten", "kept") == ()
    assert any(re.search(REASONS[attend], site.reason) for site in report.sites), report.sites


@pytest.mark.parametrize(
    "attend", [column_of_twos, column_of_ones_in_front, first_column_as_divisor], ids=lambda f: f.__name__
)
def test_a_column_that_is_not_the_sum_is_left_alone(attend: Callable[..., Tensor]) -> None:
    assert check_like_eager(attend, tensors()).having("rewritten", "kept") == ()


def test_exp_of_something_else_is_not_mentioned() -> None:
    assert found_in(lambda x: torch.exp(x) + 1, torch.randn(3, 4)) == []


def cast_before_it_is_summed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k).half()
    return (weights / weights.sum(-1, keepdim=True)).to(v.dtype) @ v


def cast_between_the_sum_and_the_division(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k)
    return weights / weights.sum(-1, keepdim=True).half().to(v.dtype) @ v


def cast_before_the_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k)
    return (weights.half() @ v.half()).to(v.dtype) / weights.sum(-1, keepdim=True)


def sum_of_the_values_cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k)
    return (weights @ v) / weights.sum(-1, keepdim=True).half().to(v.dtype)


EARLY = [
    cast_before_it_is_summed, cast_between_the_sum_and_the_division, cast_before_the_values, sum_of_the_values_cast,
]  # fmt: skip


@pytest.mark.parametrize("attend", EARLY, ids=lambda f: f.__name__)
def test_exponentials_of_any_size_are_left_in_a_type_that_ends_early(attend: Callable[..., Tensor]) -> None:
    report = check_like_eager(attend, tensors())
    assert report.having("rewritten", "kept") == ()
    assert any("cast to torch.float16" in site.reason for site in report.sites), report.sites


def cast_after_the_division(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k)
    return (weights / weights.sum(-1, keepdim=True)).half() @ v.half()


def cast_to_a_type_that_reaches_as_far(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = exponentials(q, k).bfloat16()
    return (weights / weights.sum(-1, keepdim=True)) @ v.bfloat16()


def cast_below_the_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    weights = (scores - scores.amax(-1, keepdim=True)).exp().half()
    return (weights / weights.sum(-1, keepdim=True)) @ v.half()


LATE = [cast_after_the_division, cast_to_a_type_that_reaches_as_far, cast_below_the_maximum]


@pytest.mark.parametrize("attend", LATE, ids=lambda f: f.__name__)
def test_exponentials_may_be_cast_where_they_cannot_overflow(attend: Callable[..., Tensor]) -> None:
    assert [site.verdict for site in check_like_eager(attend, tensors()).attention] == ["rewritten"]


def test_without_the_maximum_the_site_says_that_the_graph_overflows() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = exponentials(q, k)
        return (weights / weights.sum(-1, keepdim=True)) @ v

    assert site_of(attend, *tensors()).unshifted
    (site,) = check_like_eager(attend, tensors()).attention
    assert "overflows where the call does not" in site.reason
