"""The coverage benchmark around its measurements: it goes on where it was interrupted; its page says what happened."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import coverage_journal
import coverage_page
import coverage_report
from coverage_journal import Journal, Task
from coverage_measure import Row, _Counting, _note
from coverage_modes import PADDED, PLAIN, Mode
from coverage_subjects import Prepared, Subject

from attnopt.report import Report


def unused(_: Mode) -> Prepared:
    raise AssertionError("nothing is measured here")


SUBJECT = Subject("causal", "Model", unused)


def row(mode: Mode, **given: object) -> dict[str, object]:
    return {"family": "causal", "name": "Model", "mode": str(mode), "softmaxes": 2, **given}


def test_an_interrupted_run_goes_on_behind_its_last_whole_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(coverage_journal, "ROOT", tmp_path)
    first = Journal.opened("all")
    first.add(row(PLAIN))
    with first.path.open("a") as file:
        file.write('{"family": "cau')
    second = Journal.opened("all")
    todo = second.missing([Task(SUBJECT, (PLAIN, PADDED))])
    assert [task.modes for task in todo] == [(PADDED,)]
    second.add(row(PADDED))
    assert Journal.opened("all").missing(todo) == []
    assert Journal.opened("other").rows == []


def test_a_changed_source_starts_a_run_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(coverage_journal, "ROOT", tmp_path)
    Journal.opened("all").add(row(PLAIN))
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "rule.py").write_text("RULE = 1\n")
    assert Journal.opened("all").rows == []


@pytest.mark.parametrize(
    ("warning", "crashes", "untouched"),
    [
        ("attnopt left a graph untouched: KeyError: 'val'", 1, 0),
        ("attnopt left a graph untouched: Unsupported: inner", 1, 0),
        ("attnopt left a graph untouched: torch.func (vmap, grad) is used inside, and its values", 0, 1),
        ("attnopt left a graph untouched: graph inputs x have no example values", 0, 1),
    ],
)
def test_an_exception_is_a_crash_and_a_decision_is_none(warning: str, crashes: int, untouched: int) -> None:
    found = Row("causal", "Model", str(PLAIN))
    _note(found, _Counting(made=[Report(warnings=(warning,))]))
    assert (len(found.crashes), len(found.untouched)) == (crashes, untouched)


def test_sites_of_an_untouched_graph_are_explained_and_not_rewritten() -> None:
    left = row(PLAIN, untouched=["attnopt left a graph untouched: why"])
    [figures] = coverage_report.figures([left])
    assert (figures.sites, figures.rewritten, figures.unexplained) == (2, 0, 0)
    assert (figures.crashes, figures.untouched) == (0, 1)
    [silent] = coverage_report.figures([row(PLAIN)])
    assert silent.unexplained == 2


def test_equal_reasons_are_one_line_with_their_models_and_modes() -> None:
    rows = [row(mode, crashes=["KeyError: 'val'"]) for mode in (PLAIN, PADDED)]
    lines = list(coverage_page._grouped(rows, "crashes"))
    assert lines == [f"- KeyError: 'val' (Model; {PLAIN}, {PADDED})"]


def test_masks_that_are_not_proven_are_listed() -> None:
    opaque = row(PLAIN, causal=2, verdicts={"rewritten": 2}, specs={"softmax scale=0.25 full bias": 2})
    assert list(coverage_page._opaque([opaque])) == [f"- read as full bias (Model; {PLAIN})"]
    [figures] = coverage_report.figures([opaque])
    assert (figures.proven, figures.causal) == (0, 2)
    proven = opaque | {"specs": {"softmax scale=0.25 causal": 2}}
    assert list(coverage_page._opaque([proven])) == []


def test_what_is_wrong_fails_the_run() -> None:
    good = row(PLAIN, verdicts={"rewritten": 2})
    assert coverage_report.status({"rows": [good]}) == 0
    assert coverage_report.status({"rows": [good | {"wrong": ["output 0 is off"]}]}) == 1
    assert coverage_report.status({"rows": [good | {"crashes": ["KeyError"]}]}) == 1


def test_the_readme_has_a_place_for_its_table() -> None:
    text = coverage_page.README.read_text()
    assert text.index(coverage_page._BEGIN) < text.index(coverage_page._END)
    table = coverage_page.readme([row(PLAIN, verdicts={"rewritten": 2}, inductor=0)])
    assert "| causal language models, eager attention | 1 | 2 | 100.0 % | 0.0 % |" in table
