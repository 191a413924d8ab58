"""The decoder, its caches and the script behind benchmarks/sparq_model_gpu.py, at sizes that a CPU can do."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("sparq_model_gpu")
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def parts(script: ModuleType) -> ModuleType:
    return sys.modules["_sparq_model"]


@pytest.fixture
def setting(script: ModuleType) -> Any:
    """Two key heads for four query heads, 16 positions, one sequence."""
    return script.Setting("tiny", script.TINY_SIZES, 1, 16)


def filled_by(text: Tensor, model: Any, rotary: Any, caches: list[Any]) -> Tensor:
    """The logits of a text, whose keys and values go into the caches."""

    def attend(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        at = torch.arange(q.shape[2])[None]
        q, k = rotary.turned(q, at), rotary.turned(k, at)
        caches[layer].reset()
        caches[layer].append(k, v)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return model(text, attend)


@pytest.mark.parametrize("way", ["by_head", "by_group"])
def test_a_step_over_a_text_is_the_texts_next_row(
    script: ModuleType, parts: ModuleType, setting: Any, way: str
) -> None:
    place = parts.Place(CPU, torch.float64)
    decoding = parts.decoder(setting.sizes, place, position=15)
    text = parts.tokens(replace(setting, batch=16), place).mT
    plain = replace(decoding.model)  # before and after as they are without positions
    caches = parts.filled(setting, place, "both")
    want = filled_by(text, plain, plain.rotary, caches)[:, -1:]
    filled_by(text[:, :-1], plain, plain.rotary, caches)
    found = decoding.model(text[:, -1:], parts.dense(caches, getattr(parts, way)))
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
    filled_by(text[:, :-1], plain, plain.rotary, caches)
    everything = parts.sparq(caches, parts.Choices(rank=2, topk=16, local=4))
    torch.testing.assert_close(decoding.model(text[:, -1:], everything), want, rtol=1e-6, atol=1e-6)
    decoding.move(14)
    assert float((decoding.model(text[:, -1:], everything) - want).abs().max()) > 1e-6


def test_both_kinds_of_caches_hold_the_same(parts: ModuleType, setting: Any) -> None:
    place = parts.Place(CPU, torch.float32)
    for one, both in zip(*(parts.filled(setting, place, keys) for keys in ("one", "both")), strict=True):
        assert torch.equal(one.k, both.k)
        assert torch.equal(one.v, both.v)
        assert one.k_t is None
        assert torch.equal(both.k_t, both.k.mT)
        torch.testing.assert_close(both.v_mean, both.v[:, :, :15].mean(2))
        assert both.lengths.tolist() == [15]
    with pytest.raises(ValueError, match="a context of 20"):
        parts.filled(replace(setting, context=20), place, "one")


def test_checks_pass_and_can_fail(
    script: ModuleType, parts: ModuleType, setting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = replace(setting, context=64), CPU, torch.bfloat16, parts.Choices(4, 16, 4)
    checks = sys.modules["_sparq_model_checks"]
    assert checks.check(*given)["passed"]
    definition = checks.definition
    monkeypatch.setattr(
        checks, "definition", lambda q, cache, c: definition(q, cache, replace(c, topk=c.topk - 4))
    )
    assert not checks.check(*given)["passed"]


def test_the_script_checks_times_and_writes(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["sparq_model_gpu.py", "--tiny", "--out", str(out)])
    assert script.main() == 0
    held = json.loads(out.read_text())
    assert [row["passed"] for row in held["checks"]] == [True, True]
    assert len(held["rows"]) == 2
    for row in held["rows"]:
        assert row["times_faster"] == row["dense"]["ms"] / row["sparq"]["ms"]
        assert row["dense"]["by"] in row["dense"]["attention_ms"]
        assert row["replay_apart"] == 0.0
    assert "4 of 4 checks right" in capsys.readouterr().out


def test_what_is_late_or_too_large_is_told(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, out = script.tiny(), tmp_path / "out.json"
    found = script.run(replace(work, checked=()), list(work.timed), -1.0, out)
    assert [row["left_out"] for row in found["rows"]] == ["time is over"] * 2
    assert "left out, time is over" in script.line(found["rows"][0])
    large = script.Work(script.Place(torch.device("cuda"), torch.bfloat16))
    card = SimpleNamespace(total_memory=int(85.0e9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    lacking = [str(s) for s in large.timed if script.lacks(s, large)]
    assert lacking == ["llama-2-7b B1 S131072", "llama-3.1-8b B4 S131072"]


def test_sizes_are_those_of_the_models(script: ModuleType) -> None:
    work = script.Work(script.Place(CPU, torch.bfloat16))
    count = {s.name: s.weights / 1e9 for s in work.timed}
    assert count["llama-2-7b"] == pytest.approx(
        6.738 - 32_000 * 4096e-9, abs=1e-3
    )  # one matrix of two is the head
    assert count["llama-3.1-8b"] == pytest.approx(8.030 - 128_256 * 4096e-9, abs=1e-3)
    mine = script.tiny().timed[0]
    tensors = script.decoder(mine.sizes, script.tiny().place).model.tensors()
    assert mine.weights == sum(x.numel() for x in tensors if x.dim() == 2)
    assert mine.cached == sum(2 * c.k.numel() for c in script.filled(mine, script.tiny().place, "one"))


def test_the_verdict_names_where_the_claim_holds(script: ModuleType) -> None:
    fast, slow = (
        {"model": "m", "batch": 1, "context": n * 1024, "times_faster": x, "passed": x > 2}
        for n, x in ((64, 2.5), (32, 1.5))
    )
    found = {"checks": [{"passed": True}], "rows": [fast, slow, {**slow, "left_out": "time is over"}]}
    assert script.verdict(found) == "2 of 3 checks right; above 2.0 times at 1 of 2 settings, m B1 S64k"


def test_a_graph_that_differs_is_noticed(script: ModuleType, parts: ModuleType, setting: Any) -> None:
    caches = parts.filled(setting, parts.Place(CPU, torch.float32), "both")

    def step() -> Tensor:
        caches[0].v_mean.add_(1.0)
        return caches[0].v_mean[0].clone()

    assert script.replay_apart(caches, step, step) == 0.0
    assert script.replay_apart(caches, step, lambda: 1.1 * step()) == pytest.approx(0.1, rel=1e-3)


def test_fused_parts_are_compiled_once_for_all_ways(
    script: ModuleType, parts: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs, compiler = [], torch.compile

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend=backend))
    torch._dynamo.reset()
    place = parts.Place(CPU, torch.float32, fused=True)
    setting = script.Setting("tiny", script.TINY_SIZES, 2, 32)
    decoding, ids = parts.decoder(setting.sizes, place, 31), parts.tokens(setting, place)
    one, both = (parts.filled(setting, place, keys) for keys in ("one", "both"))
    everything = parts.sparq(both, parts.Choices(4, 32, 4))
    found = []
    for name, count in (("cublas", 2), ("triton", 4)):
        decoding.multiply_by(name)
        ways = parts.none(setting, place), parts.dense(one, parts.by_group), everything
        found += [decoding.model(ids, attend) for attend in ways]
        assert len(graphs) == count
    want = parts.decoder(setting.sizes, replace(place, fused=False), 31).model(ids, everything)
    for logits in (*found[1:3], *found[4:]):
        torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 1500, 30), (2, 1, 1024, 4), (2, 1, 40, 5)])
def test_a_plain_kernel_multiplies(script: ModuleType, shape: tuple[int, ...]) -> None:
    batch, tokens, k, n = shape
    products = importlib.import_module("_sparq_model_product")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU: Triton's interpreter
    x, weight = torch.randn(batch, tokens, k, device=device), torch.randn(n, k, device=device)
    torch.testing.assert_close(products.launch(x, weight), x @ weight.mT, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="wanted at most 2 rows"):
        products.launch(torch.randn(3, 1, k), weight)
