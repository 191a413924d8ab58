"""The coverage benchmark's judge: a wrong gradient is found, rounding is not taken for one, nothing else is excused."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import coverage_measure
from coverage_compare import Result, differences, disproof
from coverage_measure import measure
from coverage_modes import Mode
from coverage_rounding import Redrawn, Widened, widen
from coverage_subjects import Prepared, Subject

from attnopt.backend import attnopt as backend

TRAINING = Mode(training=True)


class Attention(nn.Module):
    """One layer; the gradient of the key's bias is zero but for rounding: softmax does not see a shift of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.mT * 8**-0.5, -1, dtype=torch.float32).to(q.dtype)
        return (weights @ v).transpose(1, 2).flatten(2)


def prepared(_: Mode) -> Prepared:
    torch.manual_seed(0)
    return Prepared(Attention().eval(), {"x": torch.randn(2, 20, 16)})


SUBJECT = Subject("torch.nn", "attention", prepared)


def planting(size: float, where: str, dtypes: tuple[torch.dtype, ...]) -> Any:
    """attnopt's backend, with the gradient of one parameter made too large by a part of `size`."""

    def compiled(module: GraphModule, inputs: Any, **given: Any) -> Any:
        for node in list(module.graph.find_nodes(op="placeholder")):
            value = node.meta["example_value"]
            if where in node.name and inputs[0].dtype in dtypes and isinstance(value, Tensor):
                with module.graph.inserting_after(node):
                    planted = module.graph.call_function(steeper, (node, size))
                node.replace_all_uses_with(planted, delete_user_cb=lambda user, new=planted: user is not new)
        module.recompile()
        return backend(module, inputs, **given)

    return compiled


def steeper(x: Tensor, size: float) -> Tensor:
    """The same value, with a gradient that is larger by a part."""
    return x + size * (x - x.detach())


WEIGHT = "q_parameters_weight"


def judged(monkeypatch: pytest.MonkeyPatch, *planted: Any) -> coverage_measure.Row:
    torch.set_num_threads(1)
    monkeypatch.setattr(coverage_measure, "attnopt_backend", planting(*planted))
    row = measure(SUBJECT, TRAINING, peers=False)
    assert (row.error, row.verdicts) == ("", {"rewritten": 1})
    return row


def test_a_right_rewrite_is_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    row = judged(monkeypatch, 0.0, "nothing", ())
    assert (row.wrong, row.proven) == ([], True)


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float32, torch.float64)], ids=["fp32", "both"])
def test_a_gradient_that_is_wrong_by_a_part_in_ten_thousand_is_found(
    monkeypatch: pytest.MonkeyPatch, dtypes: tuple[torch.dtype, ...]
) -> None:
    row = judged(monkeypatch, 1e-4, WEIGHT, dtypes)
    assert any(text.startswith("gradient of q.weight") for text in row.wrong)
    assert not row.proven


def test_an_error_far_below_the_rounding_of_fp32_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    row = judged(monkeypatch, 1e-9, WEIGHT, (torch.float32, torch.float64))
    assert [text.split(" is off")[0] for text in row.wrong] == ["gradient of q.weight in fp64"]


def test_a_gradient_that_vanishes_by_symmetry_may_be_any_rounding_but_no_more() -> None:
    held, wide = prepared(TRAINING), prepared(TRAINING)
    wide = coverage_measure._cast(wide, torch.float64)
    with Widened():
        exact = coverage_measure.run(wide, wide.model, TRAINING)
    eager = coverage_measure.run(held, held.model, TRAINING)
    draws = [eager]
    for seed in range(8):
        with Redrawn(seed):
            draws.append(coverage_measure.run(held, held.model, TRAINING))
    assert float(exact.gradients["k.bias"].norm()) < 1e-14
    spread = max(float(draw.gradients["k.bias"].norm()) for draw in draws)
    for times, found in ((1.0, 0), (10.0, 1)):
        bias = torch.full((16,), times * spread / 4)
        got = Result(eager.outputs, {**eager.gradients, "k.bias": bias})
        assert len(differences(got, draws, exact, torch.float32)) == found


def test_redrawn_roundings_are_of_the_size_of_roundings() -> None:
    a, b = torch.randn(2, 3, 8, 64), torch.randn(2, 3, 64, 8)
    with Redrawn(0):
        moved = a @ b
    off = (moved / (a @ b) - 1).abs()
    assert 0 < float(off.max()) < 2.1 * torch.finfo(torch.float32).eps
    assert bool((off > 0).float().mean() > 0.9)


@torch.no_grad()
def test_a_program_in_fp64_is_in_fp64_throughout() -> None:
    model = Attention().double()
    x = torch.randn(1, 20, 16, dtype=torch.float64)
    with Widened():
        got = model(x)
    q, k, v = (f(x).unflatten(-1, (2, 8)).transpose(1, 2) for f in (model.q, model.k, model.v))
    exact = (torch.softmax(q @ k.mT * 8**-0.5, -1) @ v).transpose(1, 2).flatten(2)
    assert float((got - exact).abs().max()) < 1e-15
    assert float((model(x) - exact).abs().max()) > 1e-10  # as written, the softmax is in fp32

    def widened(module: GraphModule, _: object) -> Any:
        widen(module)
        return module.forward

    assert float((torch.compile(model, backend=widened)(x) - exact).abs().max()) < 1e-15


def test_other_outputs_or_gradients_are_no_proof() -> None:
    x = torch.ones(2, 2, dtype=torch.float64)
    one, other = Result([x], {"a": x}), Result([x], {"b": x})
    assert disproof(one, other, [])
    assert disproof(one, one, [other])
    assert not disproof(one, one, [one])


class Broken(Attention):
    """Dynamo leaves a cast to Python: exact for these inputs, in which fp32 is enough, but not for their gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(narrowed(x + self.shift))


@torch.compiler.disable
def narrowed(x: Tensor) -> Tensor:
    return x.to(torch.float32).to(x.dtype)


class Cancelling(Attention):
    """Each gradient of `gain` is a difference of equal sums, which are in fp32 in every model."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        wide, gain = x.float(), self.gain.float()
        return super().forward((wide * gain + wide * (1e3 * gain) - (1e3 * wide) * gain).to(x.dtype))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", [Broken, Cancelling])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_eager_in_fp64_rounds_itself_is_no_error(kind: type[Attention], dtype: str) -> None:
    torch.set_num_threads(1)

    def prepare(_: Mode) -> Prepared:
        torch.manual_seed(0)
        return Prepared(kind(), {"x": torch.randn(2, 20, 16)})

    row = measure(Subject("torch.nn", "attention", prepare), Mode(dtype=dtype, training=True), peers=False)
    assert (row.error, row.wrong, row.proven) == ("", [], True)
    assert row.verdicts == {"rewritten": 1}
