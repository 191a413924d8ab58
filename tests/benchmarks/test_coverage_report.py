"""What the table of the coverage benchmark counts."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

MODE = "eager-none-fp32-eval-static"
DELTA = "a delta rule: the state is multiplied by a matrix, I - beta k k^T, which no kernel states yet"


def row(**fields: Any) -> dict[str, Any]:
    plain = {"family": "causal", "name": "Model", "mode": MODE, "softmaxes": 3, "structural": 3, "causal": 3}
    return {**plain, "verdicts": {"rewritten": 3}, "specs": {"softmax scale=1 causal": 3}, **fields}


def left(reason: str, times: int) -> list[list[Any]]:
    return [["refused", "linear", reason, "model.py:7 x = y", times]]


@pytest.mark.parametrize(
    ("reason", "cell"),
    [(DELTA, "2/2 (+3)"), ("a loop over positions computes with a number made of sizes", "2/5"), ("", "2/5")],
)
def test_a_recurrence_of_another_family_is_no_linear_site_of_ours(
    benchmark: Callable[[str], ModuleType], reason: str, cell: str
) -> None:
    report = benchmark("coverage_report")
    rows = [row(linear={"rewritten": 2, "refused": 3}, left=left(reason, 3))]
    (headers, _, cells) = (line.split("|") for line in report.table({"rows": rows}).splitlines())
    assert cells[headers.index(" linear ")].strip() == cell


def test_a_site_without_a_line_in_the_report_counts_against_the_run(
    benchmark: Callable[[str], ModuleType],
) -> None:
    report = benchmark("coverage_report")
    assert report.status({"rows": [row()]}) == 0
    assert report.status({"rows": [row(verdicts={"rewritten": 2})]}) == 1
    assert report.status({"rows": [row(verdicts={"rewritten": 2}, breaks=["data"])]}) == 0
    assert report.status({"rows": [row(wrong="off by 1")]}) == 1
    assert report.status({"rows": [row(family="decoys")]}) == 1
