"""Small changes to graphs of attention: whatever is made of a mutant, it still computes what the mutant computes.

`make deep` runs 60,000 of them (tests/hunt.py); here is a small share, always the same.
"""

from collections import Counter

import mutant_trials
import pytest
from mutant_trials import trial
from mutants import OPERATORS

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
    monkeypatch.setattr(mutant_trials, "_judge", lambda *_: None)
    drawn: Counter[str] = Counter()
    for seed in range(60):
        drawn += trial(seed).drawn
    kinds = Counter({kind: sum(n for key, n in drawn.items() if key.endswith(kind)) for kind in KINDS})
    assert kinds["differs"] >= 0.5 * sum(kinds.values()), drawn
    assert {key.split()[0] for key in drawn} >= set(OPERATORS) - {"mutation_of_a_condition"}


KINDS = ("differs", "same", "broken")
