"""Exported programs: rewritten beside the original, saved, loaded elsewhere, with other lengths; and explain."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import assert_same
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import attnopt
from attnopt.errors import OptionError, StrictError, UnsupportedError


class Attend(nn.Module):
    """Causal attention spelled out, and a projection after it."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 16)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
        weights = (q @ k.mT / torch.tensor(4.0)).masked_fill(hidden, float("-inf")).softmax(-1)
        return self.out(weights @ v)


def inputs(length: int = 8) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 4, length, 16) for _ in range(3))


def exported(model: nn.Module) -> ExportedProgram:
    length = Dim("length", min=2, max=512)
    return torch.export.export(model, inputs(), dynamic_shapes=({2: length}, {2: length}, {2: length}))


def test_a_program_is_rewritten_and_the_original_is_not_touched() -> None:
    model = Attend().eval()
    program = exported(model)
    before = str(program.graph)
    rewritten, report = attnopt.rewrite(program)
    assert str(program.graph) == before
    assert [(s.verdict, s.kernel, s.spec) for s in report.sites] == [
        ("rewritten", "sdpa", "softmax scale=0.25 causal")
    ]
    for length in (2, 8, 33):
        given = inputs(length)
        exact = copy.deepcopy(model).double()(*(x.double() for x in given))
        assert_same(rewritten.module()(*given), exact, model(*given))


def test_rewriting_again_changes_nothing_more() -> None:
    once, _ = attnopt.rewrite(exported(Attend()))
    twice, report = attnopt.rewrite(once)
    assert str(twice.graph) == str(once.graph)
    assert [s.verdict for s in report.sites] == ["kept"]


def test_a_streamed_program_loads_in_a_fresh_process_and_takes_other_lengths(tmp_path: Path) -> None:
    model = Attend().eval()
    rewritten, report = attnopt.rewrite(exported(model), {"softmax": "streaming", "sinks": 1, "window": 4})
    assert [(s.kernel, s.exact) for s in report.sites] == [("streaming", False)]
    given = inputs(19)
    torch.export.save(rewritten, tmp_path / "saved.pt2")
    torch.save({"inputs": given, "out": rewritten.module()(*given)}, tmp_path / "given.pt")
    code = (
        "import torch, attnopt\n"
        f"held = torch.load({str(tmp_path / 'given.pt')!r}, weights_only=True)\n"
        f"out = torch.export.load({str(tmp_path / 'saved.pt2')!r}).module()(*held['inputs'])\n"
        "print(torch.equal(out, held['out']))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "True", done.stderr[-1000:]


def test_the_error_of_an_approximation_is_measured_on_the_example_inputs() -> None:
    model = Attend().eval()
    program = exported(model)
    exact = program.module()(*inputs())
    assert exact.shape == (2, 4, 8, 16)
    near = attnopt.rewrite(program, {"softmax": "streaming", "sinks": 1, "window": 2})[1].sites[0]
    same = attnopt.rewrite(program, {"softmax": "streaming", "sinks": 1, "window": 8})[1].sites[0]
    assert near.approximation_error is not None
    assert near.approximation_error > 0.01
    assert same.approximation_error == pytest.approx(0, abs=1e-6)
    assert attnopt.rewrite(program)[1].sites[0].approximation_error is None


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"rewrite\(\) got a Attend; wanted a torch.export.ExportedProgram"
    ):
        attnopt.rewrite(Attend())


def test_options_are_checked_before_anything_happens() -> None:
    with pytest.raises(OptionError, match="did you mean 'softmax'"):
        attnopt.rewrite(exported(Attend()), {"softmx": "streaming"})


def test_explain_leaves_the_model_as_it_is() -> None:
    model = Attend().eval()
    given = inputs()
    before = model(*given)
    report = attnopt.explain(model, *given)
    assert [s.verdict for s in report.sites] == ["rewritten"]
    assert torch.equal(model(*given), before)


def test_strict_raises_for_a_program() -> None:
    class Mixed(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.softmax((q @ k.mT).cumsum(-1).tan(), -1) @ v

    with pytest.raises(StrictError, match="aten::tan between Q K"):
        attnopt.rewrite(torch.export.export(Mixed(), inputs()), {"strict": True})
