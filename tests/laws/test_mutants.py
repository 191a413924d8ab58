"""Small changes to graphs of attention: whatever is made of a mutant, it still computes what the mutant computes.

`make deep` runs 60,000 of them (tests/hunt.py); here is a small share, always the same.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import mutant_trials
import pytest
import torch
from mutant_outcomes import EXACT, Noise, compare, noise_of, run
from mutant_programs import traced
from mutant_trials import trial
from mutants import OPERATORS
from torch import Tensor

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
