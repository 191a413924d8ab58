"""Programs that mix no_grad, hooks, checkpoints, autocast, writes and views: each computes what eager computes."""

import adversaries_linear  # noqa: F401 - more of them
import pytest
from adversaries import ADVERSARIES, Adversary
from compiling import check_like_eager

names = pytest.mark.parametrize("case", ADVERSARIES, ids=lambda case: case.attend.__name__)


@pytest.mark.filterwarnings("ignore")
@names
def test_gradients_are_those_of_eager(case: Adversary) -> None:
    check_like_eager(case.attend, case.inputs(), differentiable=case.differentiable)


@pytest.mark.filterwarnings("ignore")
@names
def test_outputs_are_those_of_eager(case: Adversary) -> None:
    check_like_eager(case.attend, case.inputs(), dynamic=not case.fixed, allow=("streaming", "lightning"))


def test_most_of_them_are_rewritten_nevertheless() -> None:
    plain = {
        "refined_three_times",
        "residual_added_in_place",
        "scores_the_other_way_round",
        "cache_filled_in_place",
    }
    cases = [case for case in ADVERSARIES if case.attend.__name__ in plain]
    reports = [check_like_eager(case.attend, case.inputs(), differentiable=3) for case in cases]
    assert [{site.verdict for site in report.attention} for report in reports] == [{"rewritten"}] * len(plain)
