"""Two programs agree when their outputs differ by no more than rounding; anything else is seen."""

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, export

from attnopt.cli_bench import Plan, Timing, measure
from attnopt.cli_bench import table as timing_table
from attnopt.cli_compare import OutputCheck, as_dicts, compare, failed, table


class Attend(nn.Module):
    """Causal attention, spelled out; `shift` stands for a mistake in the rewriting."""

    def __init__(self, shift: float = 0.0, *, fused: bool = False) -> None:
        super().__init__()
        self.shift, self.fused = shift, fused
        self.register_buffer("mask", torch.ones(8, 8, dtype=torch.bool).tril())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.fused:
            out = nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.5)
        else:
            scores = (x @ x.mT).float() * 0.5
            out = scores.masked_fill(~self.mask, float("-inf")).softmax(-1).to(x.dtype) @ x
        if self.shift:
            out = out + self.shift * torch.nn.functional.pad(torch.ones_like(out[..., 3:4, :]), (0, 0, 3, 4))
        return {"out": out, "length": torch.full((2,), x.shape[-2])}


def programs(dtype: torch.dtype, **wrong: object) -> tuple[ExportedProgram, ExportedProgram, tuple[Tensor]]:
    x = torch.randn(1, 2, 8, 4).to(dtype)
    return export(Attend(), (x,)), export(Attend(fused=True, **wrong), (x,)), (x,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_fused_call_agrees_with_the_plain_one(dtype: torch.dtype) -> None:
    old, new, inputs = programs(dtype)
    checks = compare(old, new, inputs, {}, exact=True)
    assert [check.name for check in checks] == ["['out']", "['length']"]
    assert [check.verdict for check in checks] == ["ok", "ok"]
    assert checks[0].allowance is not None


@pytest.mark.parametrize(
    ("dtype", "shift"), [(torch.float32, 1e-4), (torch.float64, 1e-6), (torch.bfloat16, 0.1)]
)
def test_an_error_in_one_row_is_found(dtype: torch.dtype, shift: float) -> None:
    old, new, inputs = programs(dtype, shift=shift)
    checks = compare(old, new, inputs, {}, exact=True)
    assert [check.name for check in failed(checks)] == ["['out']"]
    assert checks[0].allowance > 1


def test_an_approximation_is_measured_and_does_not_fail() -> None:
    old, new, inputs = programs(torch.float32, shift=0.1)
    checks = compare(old, new, inputs, {}, exact=False)
    assert [check.verdict for check in checks] == ["approximate", "approximate"]
    assert checks[0].max_error == pytest.approx(0.1, rel=1e-4)
    assert checks[0].allowance is None


class Constant(nn.Module):
    """Returns what it was given at the start."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, x: Tensor) -> Tensor:
        return self.value.clone() if x.dtype == torch.float32 else x


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        ([1.0, 2.0], [1.0, 2.0], "ok"),
        ([1.0, math.nan], [1.0, math.nan], "ok"),
        ([1.0, math.inf], [1.0, math.inf], "ok"),
        ([1.0, math.nan], [1.0, 0.0], "differs"),
        ([1.0, 0.0], [1.0, math.nan], "differs"),
        ([1.0, math.inf], [1.0, -math.inf], "differs"),
        ([0.0, 0.0], [0.0, 1e-30], "differs"),
        ([], [], "ok"),
        ([1, 2], [1, 2], "ok"),
        ([1, 2], [1, 3], "differs"),
        ([True], [False], "differs"),
        ([1.0], [1.0, 1.0], "differs"),
        ([1.0], [1], "differs"),
        (3.0, 3.0, "ok"),
    ],
)
def test_values_patterns_shapes_and_types_all_count(old: object, new: object, verdict: str) -> None:
    x = torch.ones(2)
    before, after = (export(Constant(torch.tensor(value)), (x,)) for value in (old, new))
    (check,) = compare(before, after, (x,), {}, exact=True)
    assert (check.name, check.verdict) == ("output", verdict)


def test_inputs_that_a_program_changes_are_copied() -> None:
    class Change(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1)

    x = torch.zeros(3)
    program = export(Change(), (x,))
    assert [check.verdict for check in compare(program, program, (x,), {}, exact=True)] == ["ok"]
    assert torch.equal(x, torch.zeros(3))


def test_graphs_inside_the_graph_have_a_reference_too() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                angle = torch.arange(4, dtype=torch.float32) * 0.3
            out = torch.cond(x.sum() > 0, lambda a: a.sin().to(torch.float32), lambda a: a.cos(), (x,))
            return out @ angle

    x = torch.rand(3, 4)
    program = export(Branch(), (x,))
    assert any("cond" in str(node.target) for node in program.graph.nodes)
    (check,) = compare(program, program, (x,), {}, exact=True)
    assert check.allowance is not None
    assert check.verdict == "ok"


def test_without_a_reference_half_the_digits_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.cli_compare._reference", lambda *_: None)
    old, new, inputs = programs(torch.float32)
    assert failed(compare(old, new, inputs, {}, exact=True)) == []
    old, new, inputs = programs(torch.float32, shift=0.1)
    assert len(failed(compare(old, new, inputs, {}, exact=True))) == 1


CHECK = OutputCheck("out", (2, 3), "float32", 1e-7, 2e-7, 0.25, "ok")


def test_the_table_has_a_line_for_each_output() -> None:
    assert table([CHECK, replace(CHECK, name="loss", shape=(), allowance=None, verdict="differs")]) == (
        "output  shape   dtype    max error  relative  row rule  verdict\n"
        "out     2x3     float32  1.0e-07    2.0e-07   0.25      ok\n"
        "loss    scalar  float32  1.0e-07    2.0e-07   -         differs"
    )


def test_infinite_errors_are_valid_json() -> None:
    bodies = list(as_dicts([replace(CHECK, max_error=math.inf, relative_error=math.nan)]))
    assert json.loads(json.dumps(bodies, allow_nan=False))[0]["max_error"] is None


class TestTiming:
    def test_variants_take_turns(self) -> None:
        order: list[str] = []
        runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
        timings = measure(runs, Plan(warmup=0, calls=4, budget=60))
        assert order[-8:] == ["a", "b"] * 4
        assert [(each.name, each.calls) for each in timings] == [("a", 4), ("b", 4)]
        assert all(0 < each.median <= each.p90 for each in timings)

    def test_the_budget_ends_the_measurement_after_three_rounds(self) -> None:
        (timing,) = measure({"a": lambda: None}, Plan(warmup=0, calls=1000, budget=0))
        assert timing.calls == 3

    def test_peak_memory_counts_what_a_call_holds(self) -> None:
        small, large = measure(
            {"small": lambda: torch.ones(10), "large": lambda: torch.ones(50_000_000)},
            Plan(calls=1, warmup=1),
        )
        assert small.peak_bytes is not None
        assert large.peak_bytes - small.peak_bytes > 100_000_000

    def test_the_table_compares_with_the_first(self) -> None:
        first = Timing("original", 0.002, 0.003, 5, 2_000_000)
        second = Timing("attnopt", 0.001, 0.0015, 5, None)
        assert timing_table([first, second]) == (
            "           median      p90  calls  peak memory  speed-up\n"
            "original  2.00 ms  3.00 ms      5         2 MB     1.00x\n"
            "attnopt   1.00 ms  1.50 ms      5            -     2.00x"
        )
