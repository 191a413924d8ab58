"""What a mutant may give where eager gives NaN or infinity, and that nothing else is excused with it."""

from collections.abc import Callable

import pytest
import torch
from mutant_infinities import STRICT, Beyond
from mutant_outcomes import EXACT, HALF, SINGLE, beyond_of, compare, difference, run
from mutant_programs import traced
from mutant_trials import Setting, judged
from torch import Tensor

INF, NAN = torch.inf, torch.nan
ANY_KIND = Beyond(any_kind=True)


def told(out: list[float], want: list[float], beyond: Beyond = STRICT) -> str:
    """What the law says of one row."""
    rows = (torch.tensor([row], dtype=torch.float64) for row in (out, want))
    return difference(*([row] for row in rows), [EXACT], beyond)  # type: ignore[misc]


@pytest.mark.parametrize("found", [NAN, INF, -INF])
def test_only_the_same_stands_for_an_infinity(found: float) -> None:
    assert (told([1.0, found], [1.0, INF]) == "") == (found == INF)


@pytest.mark.parametrize(("found", "wanted"), [(NAN, INF), (NAN, -INF), (INF, NAN), (-INF, INF)])
def test_in_linear_attention_what_is_not_finite_is_of_any_kind(found: float, wanted: float) -> None:
    assert told([1.0, found], [1.0, wanted], ANY_KIND) == ""


@pytest.mark.parametrize("beyond", [STRICT, ANY_KIND, Beyond(wide=(torch.tensor([[1.0, 2.0]]),))])
@pytest.mark.parametrize("special", [NAN, INF])
def test_a_finite_element_stays_finite(special: float, beyond: Beyond) -> None:
    assert "wanted 0" in told([special, 2.0], [1.0, 2.0], beyond)
    assert "wanted" in told([special, NAN], [1.0, NAN], beyond)


@pytest.mark.parametrize("beyond", [STRICT, ANY_KIND, Beyond(wide=(torch.tensor([[1.0, NAN]]),))])
@pytest.mark.parametrize("special", [NAN, INF])
def test_what_is_not_finite_becomes_no_number(special: float, beyond: Beyond) -> None:
    assert "wanted 1" in told([1.0, 2.0], [1.0, special], beyond)


@pytest.mark.parametrize("beyond", [STRICT, ANY_KIND, Beyond(wide=(torch.tensor([[1.5, 2.0]]),))])
def test_the_finite_elements_of_a_row_are_compared_with_eager(beyond: Beyond) -> None:
    assert "off by" in told([1.5, NAN], [1.0, NAN], beyond)


@pytest.mark.parametrize(("found", "right"), [(2.0, True), (2.1, False), (NAN, True), (INF, False)])
def test_what_single_precision_lost_is_what_double_precision_finds(found: float, right: bool) -> None:
    wide = Beyond(wide=(torch.tensor([[1.0, 2.0]], dtype=torch.float64),))
    assert (told([1.0, found], [1.0, NAN], wide) == "") == right


def test_a_huge_number_that_was_found_again_hides_no_small_one() -> None:
    wide = Beyond(wide=(torch.tensor([[1.0, 1e60]], dtype=torch.float64),))
    assert told([1.0, 1e60], [1.0, NAN], wide) == ""
    assert "off by" in told([1.1, 1e60], [1.0, NAN], wide)


HEADS = tuple(torch.randn(3, 2, 4, 19, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def growing(q: Tensor, k: Tensor, v: Tensor, times: int = 8) -> Tensor:
    """Scores that grow with the distance, up to exp(144), which is infinite in single precision alone."""
    rate, at = torch.arange(1, 5) * times / 4, torch.arange(19)
    return (q @ k.mT * (rate[:, None, None] * (at[:, None] - at)).exp().tril()) @ v


def test_what_overflows_in_single_precision_alone_is_known_in_double() -> None:
    wide = beyond_of(traced(growing, HEADS), HEADS, linear=False).wide[0]
    exact = growing(*HEADS, times=torch.tensor(8.0, dtype=torch.float64))  # type: ignore[arg-type]
    assert not bool(growing(*HEADS).isfinite().all())
    assert difference([wide], [exact], [SINGLE]) == ""


def in_a_wider_type(factor: float) -> Callable[..., tuple[Tensor]]:
    """What a call that computes the exponentials in double precision gives, times a factor."""
    rates = torch.tensor(8.0, dtype=torch.float64)
    return lambda q, k, v: (factor * growing(q, k, v, times=rates),)  # type: ignore[arg-type]


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.01, False)])
def test_a_result_more_exact_than_eager_is_right(factor: float, right: bool) -> None:
    plain = traced(growing, HEADS)
    wanted, beyond = run(plain, HEADS, training=False), beyond_of(plain, HEADS, linear=False)
    made = in_a_wider_type(factor)
    assert "NaN" in compare(made, wanted, HEADS, SINGLE, training=False)
    assert (compare(made, wanted, HEADS, SINGLE, beyond=beyond, training=False) == "") == right


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


@pytest.mark.parametrize(("which", "at"), [(0, 0), (0, 7), (0, -1), (1, 0), (1, 7), (1, -1)])
@pytest.mark.parametrize("training", [False, True])
def test_an_infinite_query_or_key_makes_no_other_row_infinite(which: int, at: int, training: bool) -> None:
    given = [x.clone() for x in HEADS]
    given[which][..., at, :3] = INF
    found = judged(causal, given, Setting(training=training))
    assert found.verdicts == ("linear rewritten",)
    assert found.wrong == ""


def growing_in_half(q: Tensor, k: Tensor, v: Tensor, dtype: torch.dtype = torch.float16) -> Tensor:
    """The weights of late rows are infinite in fp16 alone."""
    at = torch.arange(19, dtype=torch.float64)
    return (q @ k.mT * (at[:, None] - at).exp().tril().to(dtype).double()) @ v


def test_weights_that_overflow_in_half_precision_are_known_in_linear_attention_alone() -> None:
    plain = traced(growing_in_half, HEADS)
    wanted, exact = run(plain, HEADS, training=False), growing_in_half(*HEADS, dtype=torch.float64)
    assert not bool(wanted.results[0].isfinite().all())
    for factor, linear, right in ((1.0, True, True), (1.2, True, False), (1.0, False, False)):
        made = lambda *_, x=factor * exact: (x,)  # noqa: E731 - a program that gives this
        beyond = beyond_of(plain, HEADS, linear=linear)
        assert (compare(made, wanted, HEADS, HALF, beyond=beyond, training=False) == "") == right


def masked_in_half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The lowest number of fp32 is -Inf in fp16: a row that has nothing else is NaN."""
    mask = torch.full((19, 19), torch.finfo(torch.float32).min).triu(0).to(torch.float16)
    return torch.softmax(q @ k.mT + mask, -1) @ v


def test_a_lowest_number_cast_to_half_stays_an_infinite_mask() -> None:
    plain = traced(masked_in_half, HEADS)
    assert bool(run(plain, HEADS, training=False).results[0][..., 0, :].isnan().all())
    beyond = beyond_of(plain, HEADS, linear=False)
    assert beyond.wide[0].isnan().any()
    assert judged(masked_in_half, HEADS, Setting()).wrong == ""
