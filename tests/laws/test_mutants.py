"""Small changes to graphs of attention: whatever is made of a mutant, it still computes what the mutant computes.

`make deep` runs 60,000 of them (tests/hunt.py); here is a small share, always the same.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from operator import add, mul, sub, truediv
from typing import Any

import mutant_trials
import pytest
import torch
from mutant_noise import LOST, Shaken
from mutant_outcomes import EXACT, Noise, compare, noise_of, run
from mutant_programs import fits, graph_of, inputs_of, resized, traced
from mutant_trials import trial
from mutants import OPERATORS
from torch import Tensor
from torch.nn import functional

#: Seeds of one share.
SHARE = 12


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", range(3))
def test_a_mutant_is_left_alone_or_computed_right(share: int) -> None:
    found = [trial(seed) for seed in range(share * SHARE, (share + 1) * SHARE)]
    assert [f"{t.seed}: {t.name} {t.operators} {t.setting}: {t.wrong}" for t in found if t.wrong] == []
    assert sum(t.differs is not None for t in found) >= SHARE - 3


@pytest.mark.filterwarnings("ignore")
def test_most_mutants_are_programs_that_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mutant_trials, "judge", lambda *_: None)
    drawn: Counter[str] = Counter()
    for seed in range(90):
        drawn += trial(seed).drawn
    kinds = Counter({kind: sum(n for key, n in drawn.items() if key.endswith(kind)) for kind in KINDS})
    assert kinds["differs"] >= 0.5 * sum(kinds.values()), drawn
    assert {key.split()[0] for key in drawn} >= set(OPERATORS) - {"mutation_of_a_condition"}


KINDS = ("differs", "same", "broken")


HEADS = tuple(torch.randn(3, 2, 3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))


def shifted(number: float) -> Callable[..., Tensor]:
    """Attention whose scores lose digits when a number is added to them and taken away again."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q @ k.mT + number) - number).softmax(-1) @ v

    return attend


def noise(attend: Callable[..., Any]) -> Noise:
    wanted = run(attend_once(attend), HEADS, training=True)
    return noise_of(traced(attend, HEADS), wanted, HEADS, training=True)


def attend_once(attend: Callable[..., Any]) -> Callable[..., tuple[Tensor]]:
    return lambda *inputs: (attend(*inputs),)


def test_eager_knows_a_plain_attention_to_a_few_roundings() -> None:
    found = noise(shifted(1.0))
    assert 1e-17 < max(*found.results, *found.gradients) < 1e-13


def test_eager_does_not_know_the_gradients_of_scores_that_lost_their_digits() -> None:
    assert max(noise(shifted(1e12)).gradients) > 1e-6


@pytest.mark.parametrize("number", [1.0, 1e12])
def test_rounding_excuses_no_other_program(number: float) -> None:
    wanted = run(attend_once(shifted(number)), HEADS, training=True)
    other = attend_once(lambda q, k, v: shifted(number)(q, k.flip(-2), v))
    assert "off by" in compare(other, wanted, HEADS, EXACT, noise(shifted(number)), training=True)


def filled_twice(lowest: float, hidden: float) -> Callable[..., Tensor]:
    """Attention of which `lowest` hides the first key, and `hidden` all but the first keys: they may tie."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later, first = torch.ones(7, 7, dtype=torch.bool).triu(1), torch.arange(7) == 0
        scores = q @ k.mT + torch.where(first, lowest, 0.0)
        return (scores + torch.where(later, hidden, 0.0)).softmax(-1) @ v

    return attend


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9])
def test_scores_that_huge_numbers_absorb_excuse_no_fault(lowest: float) -> None:
    known = noise(filled_twice(lowest, lowest))
    assert max(known.results) < 1e-5
    wanted = run(attend_once(filled_twice(lowest, lowest)), HEADS, training=True)
    other = attend_once(filled_twice(lowest, -torch.inf))
    assert "off by" in compare(other, wanted, HEADS, EXACT, known, training=True)


def by_tiny_numbers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores so far apart that each query sees one key, and gradients are differences that vanish, times 1e12."""
    return (q @ (k / 1e-12).mT).softmax(-1) @ v


def test_eager_does_not_know_what_is_left_of_differences_in_a_backward_pass() -> None:
    wanted = run(attend_once(by_tiny_numbers), HEADS, training=True)
    fused = attend_once(lambda q, k, v: functional.scaled_dot_product_attention(q, k / 1e-12, v, scale=1.0))
    assert "gradient 0" in compare(fused, wanted, HEADS, EXACT, training=True)
    assert compare(fused, wanted, HEADS, EXACT, noise(by_tiny_numbers), training=True) == ""


def test_what_is_left_of_differences_excuses_no_other_program() -> None:
    wanted, known = run(attend_once(by_tiny_numbers), HEADS, training=True), noise(by_tiny_numbers)
    for other in (
        lambda q, k, v: by_tiny_numbers(q, k, v * 1.001),
        lambda q, k, v: by_tiny_numbers(-q, k, v),
    ):
        assert "off by" in compare(attend_once(other), wanted, HEADS, EXACT, known, training=True)


@pytest.mark.parametrize(
    "exact", [lambda x: x * 0.25, lambda x: x + 0.0, lambda x: x / 8, lambda x: x - 3e38]
)
def test_what_is_exact_or_absorbed_stays(exact: Callable[[Tensor], Tensor]) -> None:
    for seed in range(4):
        with Shaken(seed):
            found = exact(HEADS[0])
        assert torch.equal(found, exact(HEADS[0]))


@pytest.mark.parametrize(
    "inexact", [lambda x: x * 0.3, lambda x: x + 1e12, lambda x: x / 7, torch.Tensor.exp]
)
def test_what_is_rounded_changes_alike_for_the_same_numbers(inexact: Callable[[Tensor], Tensor]) -> None:
    with Shaken(0):
        found = inexact(HEADS[0].expand(2, *HEADS[0].shape))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], inexact(HEADS[0]))


def test_the_results_of_softmax_are_rounded_to_half_precision() -> None:
    """Its gradients depend on it: they hold 1 less a weight that is nearly 1."""
    scores = 3 * HEADS[0].bfloat16()
    exact, found = scores.float().softmax(-1), set()
    for seed in range(8):
        with Shaken(seed):
            weights = scores.softmax(-1)
        assert bool(((weights - exact).abs() <= 2.0**-7 * exact).all())
        found.add(str(weights.tolist()))
    assert len(found) == 8


def switching_autocast_on(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    torch.autocast("cpu", torch.bfloat16).__enter__()
    return q @ k.mT @ v


def failing_under_autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return switching_autocast_on(q, k, v) @ v


@pytest.mark.parametrize("attend", [switching_autocast_on, failing_under_autocast])
def test_what_a_mutant_leaves_switched_on_ends_with_its_run(attend: Callable[..., Any]) -> None:
    with contextlib.suppress(RuntimeError):
        run(lambda *given: (attend(*given),), HEADS, training=False)
    with contextlib.suppress(RuntimeError):
        traced(attend, HEADS)
    assert not torch.is_autocast_enabled("cpu")
    assert torch.is_autocast_cache_enabled()


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {"add": add, "sub": sub, "mul": mul, "div": truediv}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_a_rounding_takes_away_is_known(name: str, dtype: torch.dtype) -> None:
    a, b = (
        x.flatten()[:100].to(dtype) * 10.0 ** torch.arange(100).sub(50).div(10).to(dtype) for x in HEADS[:2]
    )
    made = OPERATIONS[name](a, b)
    lost = LOST[name](made.double(), a.double(), b.double())
    for x, y, z, found in zip(a.tolist(), b.tolist(), made.tolist(), lost.tolist(), strict=True):
        wanted = OPERATIONS[name](Fraction(x), Fraction(y)) - Fraction(z)
        assert found == pytest.approx(float(wanted), rel=1e-6, abs=1e-18 * abs(z))


@pytest.mark.parametrize(
    ("name", "fit"), [("loop_spellings.blocks", False), ("loop_spellings.running_sums", True)]
)
def test_other_sizes_are_tried_where_tracing_left_them_open(name: str, fit: bool) -> None:
    graph = graph_of(name, free=True)
    assert fits(graph, inputs_of(name))
    assert fits(graph, resized(name)) == fit
