"""Factors of queries and keys that are infinite whatever the data are refused; others are read."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import found_in, reject_of
from torch import Tensor

B, H, S, D = 2, 3, 7, 4


def heads() -> tuple[Tensor, ...]:
    """Queries, keys and values, and a number from 0.5 to 1.5 for each head."""
    torch.manual_seed(0)
    return (*torch.randn(3, B, H, S, D).unbind(), torch.rand(H) + 0.5)


def times(factor: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """Causal scores times factor(rates (H, 1, 1), positions (S, 1)), times the values."""

    def attend(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
        return (q @ k.mT * factor(rate[:, None, None], torch.arange(S)[:, None])).tril() @ v

    return attend


@pytest.mark.parametrize(
    "factor",
    [
        lambda rate, at: 1.0 / (rate * (at - at)),
        lambda rate, at: (rate * 0.0 * at).reciprocal(),
        lambda rate, at: 1.0 / (rate * at),
        lambda rate, at: rate / (at - 3),
    ],
    ids=["all", "by a literal", "the first", "the fourth"],
)
def test_what_is_infinite_whatever_the_data_is_refused(factor: Callable[[Tensor, Tensor], Tensor]) -> None:
    (found,) = found_in(times(factor), *heads())
    assert found.site is None


def test_the_reason_says_what_to_choose() -> None:
    reason = reject_of(times(lambda rate, at: rate / (at - 3)), *heads()).reason
    assert reason == (
        "the weights are multiplied by a number for each position that is infinite for some; "
        "choose the base of a power and the divisor of a quotient other than 0"
    )


@pytest.mark.parametrize(
    "factor",
    [
        lambda rate, at: 1.0 / (rate * (at + 1)),
        lambda rate, at: rate / (at - 3.5),
        lambda rate, at: (1.5 - rate).sqrt() * (at + 1),
        lambda rate, at: (rate * rate * at).exp2(),
    ],
    ids=["from one", "between two", "NaN for other data", "infinite for other data"],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_finite_is_read(factor: Callable[[Tensor, Tensor], Tensor], dynamic: bool) -> None:
    report = check_like_eager(times(factor), heads(), differentiable=3, dynamic=dynamic)
    assert [site.verdict for site in report.sites] == ["rewritten"]


def keep_of(dtype: torch.dtype) -> Tensor:
    """A mask of keys (B, 1, 1, S) that hides the first three of one sequence."""
    keep = torch.ones(B, 1, 1, S, dtype=torch.bool)
    keep[0, ..., :3] = False
    return keep.to(dtype)


def by_a_mask(factor: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Softmax of scores times factor(mask)."""

    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return (q @ k.mT * factor(keep)).softmax(-1) @ v

    return attend


def divided(keep: Tensor) -> Tensor:
    return 1.0 / (1 - keep)


def written_to_after_its_copy(keep: Tensor) -> Tensor:
    kept = keep.float()
    keep.logical_not_()
    return divided(kept)


def written_to_before_its_copy(keep: Tensor) -> Tensor:
    return divided(keep.logical_not_().float())


def written_to_itself(keep: Tensor) -> Tensor:
    factor = 1 + keep.float()
    return factor.sub_(1).reciprocal_()


def written_through_a_view(keep: Tensor) -> Tensor:
    factor = 1 + keep.float()
    factor[..., 2:4].fill_(0.0)
    return 1 / factor


@pytest.mark.parametrize(
    "factor",
    [
        lambda keep: divided(keep.float()),
        written_to_after_its_copy,
        written_to_before_its_copy,
        written_to_itself,
        written_through_a_view,
        lambda keep: keep / (keep.float() * 0),
    ],
    ids=["plain", "afterwards", "before", "itself", "view", "NaN"],
)
def test_a_factor_that_a_mask_makes_infinite_is_refused(factor: Callable[[Tensor], Tensor]) -> None:
    (found,) = found_in(by_a_mask(factor), *heads()[:3], keep_of(torch.bool))
    assert found.site is None


def test_a_factor_that_a_mask_of_whole_numbers_makes_infinite_is_refused() -> None:
    (found,) = found_in(by_a_mask(divided), *heads()[:3], keep_of(torch.int64))
    assert found.site is None


def written_to_and_finite(keep: Tensor) -> Tensor:
    factor = keep.float()
    factor.mul_(0.5)
    factor[..., 2:4].add_(1.0)
    return 1 / (factor + 0.5)


def infinite_until_it_is_written_to(keep: Tensor) -> Tensor:
    factor = divided(keep.float())
    factor.fill_(2.0)
    return factor * keep


@pytest.mark.parametrize("factor", [written_to_and_finite, infinite_until_it_is_written_to])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_factor_that_is_written_to_and_finite_is_read(
    factor: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    report = check_like_eager(by_a_mask(factor), (*heads()[:3], keep_of(dtype)), differentiable=3)
    assert [site.verdict for site in report.sites] == ["rewritten"]


def halves(x: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """One half of the features times, the other divided by, factor(positions (S, 1)), as in a rotation."""
    (one, other), by = x.chunk(2, -1), factor(torch.arange(S, dtype=x.dtype)[:, None])
    return torch.cat([one * by, other / by], -1)


def softmax_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).softmax(-1) @ v


def linear_of(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


FAMILIES = [softmax_of, linear_of]


@pytest.mark.parametrize("attend", FAMILIES)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("factor", [torch.sin, lambda at: at - 3, lambda at: at * 0, torch.log])
def test_an_operand_that_is_infinite_whatever_the_data_is_refused(
    attend: Callable[..., Tensor], which: int, factor: Callable[[Tensor], Tensor]
) -> None:
    def attended(*given: Tensor) -> Tensor:
        return attend(*(halves(x, factor) if n == which else x for n, x in enumerate(given)))

    reason = reject_of(attended, *heads()[:3]).reason
    assert reason.startswith(f"{'qkv'[which]} is infinite, or NaN, at some position whatever the data are")


@pytest.mark.parametrize("attend", FAMILIES)
@pytest.mark.parametrize(
    "factor", [torch.cos, lambda at: at - 3.5, lambda at: at + 1, lambda at: (at + 1).log() + 1, torch.exp]
)
def test_a_finite_operand_is_read(attend: Callable[..., Tensor], factor: Callable[[Tensor], Tensor]) -> None:
    def attended(*given: Tensor) -> Tensor:
        return attend(*(halves(x, factor) for x in given))

    report = check_like_eager(attended, heads()[:3], differentiable=3)
    assert [site.verdict for site in report.sites] == ["rewritten"]


@pytest.mark.parametrize("attend", FAMILIES)
def test_keys_divided_by_lengths_are_read(attend: Callable[..., Tensor]) -> None:
    def attended(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return attend(q, torch.cat([k, k], -1)[..., :D] / lengths[:, None, None, None], v)

    report = check_like_eager(attended, (*heads()[:3], torch.tensor([3, 5])), differentiable=3)
    assert [site.verdict for site in report.sites] == ["rewritten"]


def far() -> Tensor:
    at = torch.arange(S)
    return at[:, None] - at


def exponential(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT * (rate[:, None, None] * far()).exp().tril()) @ v


def power(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    return (q @ k.mT * torch.where(far() >= 0, rate.exp()[:, None, None] ** far(), 0.0)) @ v


def running_sum(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    run = (rate[:, None] * torch.ones(S)).cumsum(-1)
    return (q @ k.mT * (run[..., :, None] - run[..., None, :]).exp().tril()) @ v


DECAYS = [exponential, power, running_sum]


@pytest.mark.parametrize("attend", DECAYS)
@pytest.mark.parametrize(
    ("rate", "reason"),
    [
        (lambda at: 1.0 / at, "infinite or NaN"),
        (lambda at: (0.5 - at).log(), "infinite or NaN"),
        (lambda at: 0.1 * at, "grow with the distance"),
    ],
    ids=["infinite", "NaN", "growing"],
)
def test_a_decay_that_is_none_is_refused(
    attend: Callable[..., Tensor], rate: Callable[[Tensor], Tensor], reason: str
) -> None:
    found = reject_of(lambda q, k, v: attend(q, k, v, rate(torch.arange(H))), *heads()[:3])
    assert reason in found.reason


@pytest.mark.parametrize("attend", [exponential, running_sum])
def test_a_log_decay_of_minus_infinity_is_refused(attend: Callable[..., Tensor]) -> None:
    found = reject_of(lambda q, k, v: attend(q, k, v, -1.0 / torch.arange(H)), *heads()[:3])
    assert "infinite or NaN" in found.reason


@pytest.mark.parametrize("attend", DECAYS)
@pytest.mark.parametrize(
    "rate",
    [lambda at: -0.1 * at, lambda at: (1 - 2.0 ** (-5.0 - at)).log()],
    ids=["none at first", "retention"],
)
def test_a_decay_is_read(attend: Callable[..., Tensor], rate: Callable[[Tensor], Tensor]) -> None:
    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, rate(torch.arange(H)))

    report = check_like_eager(attended, heads()[:3], differentiable=3)
    assert [site.verdict for site in report.sites] == ["rewritten"]


def test_a_base_of_zero_keeps_the_diagonal() -> None:
    def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        base = (torch.arange(H) - 1.0).relu()[:, None, None] / H
        return (q @ k.mT * torch.where(far() >= 0, base ** far().clamp(min=0), 0.0)) @ v

    report = check_like_eager(attended, heads()[:3], differentiable=3)
    assert [site.verdict for site in report.sites] == ["rewritten"]


def test_a_decay_made_of_data_is_read_whatever_its_sign() -> None:
    report = check_like_eager(exponential, heads(), differentiable=3)
    assert [site.verdict for site in report.sites] == ["rewritten"]


def by_hand(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    """Running sums of the logarithms of gates, which a mask has closed where it hides a token."""
    run = kept.log().cumsum(-1).expand(B, H, S)
    return (q @ k.mT * (run[..., :, None] - run[..., None, :]).exp().tril()) @ v


def test_gates_that_a_mask_closes_are_refused() -> None:
    (found,) = found_in(
        lambda q, k, v, keep: by_hand(q, k, v, keep[:, 0].float()), *heads()[:3], keep_of(torch.bool)
    )
    assert found.site is None


def test_gates_that_a_mask_leaves_ajar_are_read() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return by_hand(q, k, v, 0.25 + 0.5 * keep[:, 0].float())

    report = check_like_eager(attend, (*heads()[:3], keep_of(torch.bool)), differentiable=3)
    assert [site.verdict for site in report.sites] == ["rewritten"]


def plus(added: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Softmax attention whose scores have added(positions (S,)) added."""

    def attend(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return (q @ k.mT + added(torch.arange(S))).softmax(-1) @ v

    return attend


@pytest.mark.parametrize(
    "added", [lambda at: -torch.log(at), lambda at: 1 / at, lambda at: (at - 1.0).sqrt()]
)
def test_a_bias_of_infinity_is_refused(added: Callable[[Tensor], Tensor]) -> None:
    assert "is +inf, or NaN" in reject_of(plus(added), *heads()).reason


@pytest.mark.parametrize("added", [torch.log, lambda at: -1 / at, lambda at: 1 / (at + 1)])
def test_a_bias_of_minus_infinity_is_read(added: Callable[[Tensor], Tensor]) -> None:
    (found,) = found_in(plus(added), *heads())
    assert found.site is not None
