"""Graph breaks are told by the user's line, in plain words, with what would help."""

import pytest
import torch
from compiling import compiled, reports_after
from torch import Tensor

import attnopt
from attnopt.breaks import summary

pytestmark = pytest.mark.filterwarnings("ignore:Graph break from:UserWarning")


def inputs() -> tuple[Tensor, ...]:
    return torch.randn(3, 1, 2, 8, 4).unbind()


def branching(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    if scores.sum() > 3:
        scores = scores * 2
    return scores.softmax(-1) @ v


def printing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    print("scores")  # noqa: T201
    return scores.softmax(-1) @ v


def looping(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    for _ in range(3):
        q = q + q.sum().item()
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (branching, "if scores.sum() > 3: -> the code branches on the value of a tensor"),
        (printing, 'print("scores")  # noqa: T201 -> Failed to trace builtin operator'),
        (looping, "all of looping() runs outside of any graph, for a break in its loop -> Unsupported Tensor.item()"),
    ],
)  # fmt: skip
def test_a_break_names_the_line_and_the_cause(function: object, told: str) -> None:
    breaks = attnopt.explain(function, *inputs()).graph_breaks
    assert any(
        line.startswith("test_everywhere_breaks.py:") and " ".join(told.split()) in line for line in breaks
    ), breaks


def test_each_break_is_a_line() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        x = x + 2
        torch._dynamo.graph_break()
        x = x + 3
        torch._dynamo.graph_break()
        return x

    report = attnopt.explain(broken, torch.randn(3))
    assert len(report.graph_breaks) == 3
    assert "no attention found" in str(report)
    assert len({line.split(":")[1] for line in report.graph_breaks}) == 3


def test_a_compilation_reports_the_break_that_ended_its_graph() -> None:
    before = attnopt.reports()
    compiled(branching)(*inputs())
    report = reports_after(before)
    assert len(report.graph_breaks) == 1
    assert "branches on the value of a tensor" in report.graph_breaks[0]
    assert len(report.graphs) == 2


def test_without_a_break_there_is_none() -> None:
    assert attnopt.explain(lambda x: x.softmax(-1), torch.randn(3)).graph_breaks == ()


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("generic_jump TensorVariable()", "the code branches on the value of a tensor"),
        ("Call to f\n  Explanation: x\n  Hint: Do g.\n  Hint: Do h.", "Call to f (Do g)"),
        ("Odd\n  Hint: Please report an issue to PyTorch.", "Odd"),
        ("", "Dynamo gave no reason"),
    ],
)
def test_the_cause_is_its_first_line_and_first_hint(text: str, short: str) -> None:
    assert summary(text) == short


def test_a_model_that_fails_says_how_far_it_was_seen() -> None:
    def failing(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if ((q @ k.mT).softmax(-1) @ v).sum() < torch.inf:
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as caught:
        attnopt.explain(failing, *inputs())
    assert "seen 1 graph: 1 of 1 attention site rewritten" in caught.value.__notes__[0]
