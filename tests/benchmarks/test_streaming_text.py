"""The model, the streams and the script behind benchmarks/streaming_text_gpu.py, at sizes that a CPU can do."""

import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture
def gpu(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("_smollm2_gpu")


@pytest.fixture
def packing(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("_smollm2_pack")


@pytest.fixture
def streams(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("_streaming_text_streams")


@pytest.fixture
def plan(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("_streaming_text_plan")


@pytest.fixture
def script(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("streaming_text_gpu")


@pytest.fixture
def model(gpu: ModuleType, plan: ModuleType) -> Any:
    """Two layers in fp64."""
    return gpu.random_model(plan.TINY_SIZES, CPU, torch.float64)


def ids(length: int) -> Tensor:
    return torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(1))


# The weights.


@pytest.mark.parametrize("form", ["F32", "Q8_0", "Q4_1"])
def test_blocks_are_read_as_gguf_reads_them(gpu: ModuleType, form: str) -> None:
    import gguf

    kind = gguf.GGMLQuantizationType[form]
    packed = gguf.quantize(np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32), kind)
    raw = torch.from_numpy(np.frombuffer(packed.tobytes(), dtype=np.uint8).copy())
    want = torch.from_numpy(np.array(gguf.dequantize(packed, kind)))
    torch.testing.assert_close(gpu.FORMS[form](raw).view(5, 64), want, rtol=0, atol=0)


def reference_model(sizes: Any) -> Any:
    """transformers' Llama of these sizes, random weights."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.width, intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads,
        rms_norm_eps=sizes.epsilon, rope_parameters={"rope_type": "default", "rope_theta": sizes.base},
        tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    found = transformers.LlamaForCausalLM(config).eval()
    for name, x in found.named_parameters():
        x.data.uniform_(0.5, 1.5) if "norm" in name else x.data.normal_(std=0.3)
    return found


def as_in_the_file(name: str, weight: Tensor, sizes: Any) -> SimpleNamespace:
    """A tensor as gguf's reader gives it: shapes backwards, rotating pairs side by side."""
    if "attn_q" in name or "attn_k" in name:
        weight = weight.unflatten(0, (-1, 2, sizes.head // 2)).transpose(1, 2).reshape_as(weight)
    data = weight.detach().numpy()
    kind = SimpleNamespace(name="F32")
    return SimpleNamespace(
        name=name, data=data, shape=data.shape[::-1], tensor_type=kind, n_bytes=data.nbytes
    )


@pytest.fixture
def stored(
    benchmark: Callable[[str], ModuleType], plan: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """transformers' model; its weights are what gguf reads from now on."""
    monkeypatch.syspath_prepend(str(BENCHMARKS.parent / "examples"))
    smollm2, sizes = benchmark("smollm2"), plan.TINY_SIZES
    language_model = reference_model(sizes)
    back = {new: old for old, new in smollm2._RENAMED.items() if "." not in new}
    names = {new: old for old, new in smollm2._RENAMED.items() if "." in new}
    tensors = []
    for name, x in language_model.model.state_dict().items():
        for new, old in names.items():
            name = name.replace(new, old)  # noqa: PLW2901 - the name as it becomes
        parts = [back.get(part, part) for part in name.split(".")]
        tensors.append(as_in_the_file(".".join(parts), x, sizes))
    reader = SimpleNamespace(GGUFReader=lambda _path: SimpleNamespace(tensors=tensors))
    monkeypatch.setitem(sys.modules, "gguf", reader)
    monkeypatch.setattr(smollm2, "_package", lambda: Path("nowhere"))
    monkeypatch.setattr(smollm2, "tokenizer", lambda: lambda text: {"input_ids": [ord(c) for c in text]})
    yield language_model
    sys.modules.pop("smollm2")


def test_what_was_packed_is_transformers_model(
    gpu: ModuleType, packing: ModuleType, plan: ModuleType, stored: Any, tmp_path: Path
) -> None:
    packing.pack(tmp_path, parts=2)
    found = gpu.load(tmp_path, CPU, torch.float32, plan.TINY_SIZES)
    given = ids(50)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(given), stored(given).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("stored")
def test_a_missing_part_is_told(gpu: ModuleType, packing: ModuleType, tmp_path: Path) -> None:
    packing.pack(tmp_path, parts=2)
    sizes = [(tmp_path / f"part{n}" / "blocks.bin").stat().st_size for n in (1, 2)]
    assert max(sizes) < 2 * min(sizes)
    (tmp_path / "part1" / "tensors.json").unlink()
    with pytest.raises(FileNotFoundError, match="1 parts; wanted 2"):
        gpu.load(tmp_path, CPU, torch.float32)


@pytest.mark.usefixtures("stored")
def test_texts_become_tokens_in_their_order(gpu: ModuleType, packing: ModuleType, tmp_path: Path) -> None:
    database = tmp_path / "Rdata.rdb"
    database.write_bytes(as_r_stores(["ab", "c", "", "d"]) + as_r_stores(["e"]))
    packing.pack(tmp_path / "out", parts=1, texts=database)
    assert bytes(gpu.tokens(tmp_path / "out").tolist()) == b"ab c\n\nd\n\ne\n\n"


def as_r_stores(lines: list[str]) -> bytes:
    """A character vector as R's lazy-load databases hold it."""
    header = b"X\n" + struct.pack(">III", 3, 0, 0) + struct.pack(">I", 5) + b"UTF-8"
    elements = b"".join(struct.pack(">II", 9, len(x)) + x.encode() for x in lines)
    raw = header + struct.pack(">II", 16, len(lines)) + elements
    return struct.pack(">I", len(raw)) + zlib.compress(raw)


# Streams.


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_stream_is_what_it_is_defined_as(streams: ModuleType, model: Any, sinks: int) -> None:
    given = ids(90)[None]
    want = model.hidden(given, streams.plain(model, sinks, 12))
    cache = streams.stream(model, sinks, 12)
    parts = [model.hidden(part, streams.through(cache)) for part in given.split([1, 40, 2, 30, 17], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-10, atol=1e-10)


def test_plain_attention_in_blocks_is_plain_attention(
    streams: ModuleType, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, attend = ids(60)[None], streams.plain(model, 3, 9)
    whole = model.hidden(given, attend)
    monkeypatch.setattr(streams, "BLOCK", 7)
    torch.testing.assert_close(model.hidden(given, attend), whole, rtol=1e-10, atol=1e-10)


def test_plain_attention_without_an_end_is_causal_attention(streams: ModuleType, model: Any) -> None:
    given = ids(60)[None]
    want = model.hidden(given)
    torch.testing.assert_close(model.hidden(given, streams.plain(model, 4, 60)), want, rtol=1e-10, atol=1e-10)
    assert float((model.hidden(given, streams.plain(model, 4, 30)) - want).abs().max()) > 1e-3


def test_the_logits_of_a_stream_depend_on_its_reach_alone(
    streams: ModuleType, plan: ModuleType, model: Any
) -> None:
    cache, text = streams.stream(model, 4, 12), plan.Text(ids(80))
    hidden = model.hidden(text.piece(0, 200, CPU), streams.through(cache))
    ends = torch.tensor([26, 77, 199])
    texts = streams.fresh_texts(text, ends, 2, cache)
    assert texts.shape == (3, 1 + replace(plan.TINY, budget=16).reach(2))
    again = model.hidden(texts, streams.through(streams.stream(model, 4, 12)))[:, -1]
    torch.testing.assert_close(again, hidden[0, ends], rtol=1e-10, atol=1e-10)
    shorter = torch.cat([texts[:, :4], texts[:, 5:]], 1)
    other = model.hidden(shorter, streams.through(streams.stream(model, 4, 12)))[:, -1]
    assert float((other - again).abs().max()) > 1e-9


def test_losses_of_a_stream_are_those_of_its_logits(
    streams: ModuleType, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "HEAD_CHUNK", 13)
    given = ids(70)
    found = streams.streamed_losses(model, streams.stream(model, 4, 12), given, segment=30)
    logits = model(given[None], streams.plain(model, 4, 12))[0]
    want = torch.nn.functional.cross_entropy(logits[:-1].float(), given[1:], reduction="none")
    torch.testing.assert_close(found, want)


def test_a_stream_that_is_replayed_begins_empty(streams: ModuleType, model: Any) -> None:
    given, cache = ids(50)[None], streams.stream(model, 4, 12)
    read = streams.reading(model, cache, given[:, :20])
    found = [read(part).clone() for part in given.split([20, 20, 10], dim=1)]
    want = model.hidden(given, streams.plain(model, 4, 12))
    torch.testing.assert_close(torch.cat(found, 1), want, rtol=1e-10, atol=1e-10)


def test_a_window_that_is_recomputed_is_a_text_of_its_own(streams: ModuleType, model: Any) -> None:
    given = ids(70)
    found = streams.recomputed_losses(model, given, torch.tensor([15, 40]), 16)
    want = [
        -model(given[None, end - 15 : end + 1])[0, -1].log_softmax(-1)[given[end + 1]] for end in (15, 40)
    ]
    torch.testing.assert_close(found, torch.stack(want).float())


def test_steps_go_on_with_a_stream(streams: ModuleType, model: Any) -> None:
    given, cache = ids(40)[None], streams.stream(model, 4, 12)
    model.hidden(given[:, :25], streams.through(cache))
    stepper = streams.Stepper(model, cache, model.logits)
    found, seconds = stepper.steps(given[:, 25:])
    want = model(given, streams.plain(model, 4, 12))[:, 25:]
    torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
    assert seconds > 0


@pytest.mark.parametrize("way", ["fused_window", "eager_window"])
def test_windows_are_recomputed_right(streams: ModuleType, model: Any, way: str) -> None:
    given = ids(40).view(2, 20)
    found = model(given, getattr(streams, way)(model, 20))
    torch.testing.assert_close(found, model(given), rtol=1e-5, atol=1e-5)


def test_a_compiled_model_is_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="aot_eager", **options))
    given = ids(30)[None]
    torch.testing.assert_close(model.compiled()(given), model(given))


# The script.


def test_claims_are_judged(benchmark: Callable[[str], ModuleType]) -> None:
    report = benchmark("_streaming_text_report")
    row = {"model": "m", "batch": 1, "keys": 4096, "times_faster_than_fused": 23.0}
    slow, short = (
        {**row, "times_faster_than_fused": 21.0},
        {**row, "keys": 1024, "times_faster_than_fused": 1.0},
    )
    found = [*report.claims({"d": {"rows": [row, slow, short], "paper": 22.2}})]
    assert [line.split()[0] for line in found] == ["holds:", "FAILS:"]


def test_all_parts_run_and_are_kept(script: ModuleType, tmp_path: Path) -> None:
    out, bench = tmp_path / "out.json", script.tiny_bench()
    script.run(bench, ["a", "b", "c"], 60.0, out)
    found = script.run(bench, ["d", "c"], 60.0, out)
    held = json.loads(out.read_text())["parts"]
    assert sorted(held) == sorted(found) == ["a", "b", "c", "d"]
    assert "torch" in held["b"]["environment"]["versions"]
    check_quality(held["a"], held["b"])
    check_speed(held["c"], held["d"])


def check_quality(novels: dict[str, Any], millions: dict[str, Any]) -> None:
    assert novels["recomputed"]["windows"] == 24
    assert 0.5 < novels["recomputed"]["by_sinks"]["4"]["ratio"] < 2.0
    assert set(novels["curves"]) == {"full attention", "4 sinks", "0 sinks"}
    checks = millions["checks"]
    assert (millions["tokens"], checks["points"], checks["exact_points"]) == (1000, 22, 4)
    assert checks["tokens_of_a_fresh_text"] == 27
    assert len(millions["decoding"]) == 3
    assert len(millions["perplexity_by_round"]) == 2
    assert checks["worst_times_fresh_error"] < 3
    assert checks["stream_to_fresh"]["max"] < 0.1


def check_speed(prefill: dict[str, Any], latency: dict[str, Any]) -> None:
    assert prefill["stepped_tokens"] == prefill["tokens"] == 150
    assert prefill["stepped_to_exact"]["max"] < 2 * prefill["parallel_to_exact"]["max"]
    assert len(latency["rows"]) == 2 * 2 * 2
    assert all(row["times_faster_than_fused"] > 0 for row in latency["rows"])


def test_parts_end_with_their_time(script: ModuleType) -> None:
    found = script.run(script.tiny_bench(), ["a", "b", "c"], -1.0, None)
    assert found["a"]["recomputed"]["windows"] == 8
    assert (found["b"]["tokens"], found["b"]["checks"]["points"]) == (105, 2)
    assert found["b"]["checks"]["exact_points"] == 1
    assert script.latency(script.tiny_bench(), -1.0)["rows"] == []


def test_perplexities_are_compared_token_by_token(benchmark: Callable[[str], ModuleType]) -> None:
    parts = benchmark("_streaming_text_parts")
    theirs = torch.rand(10_000) * 5
    found = parts.paired(theirs + 0.01 + 0.1 * torch.randn(10_000), theirs)
    assert found["ratio"] == pytest.approx(1.01005, abs=4e-3)
    assert found["standard_error"] == pytest.approx(1e-3, rel=0.05)
    assert parts.curve(torch.tensor([0.0, 0.0, 1.0, 1.0, 9.0]), 2) == pytest.approx([1.0, 2.7182818])


def test_without_weights_it_says_how_to_get_them(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["streaming_text_gpu.py", "--weights", str(tmp_path)])
    assert script.main() == 0
    assert "_smollm2_pack.py" in capsys.readouterr().out


def test_the_plot_is_drawn(
    script: ModuleType,
    benchmark: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report, out = benchmark("_streaming_text_report"), tmp_path / "out.json"
    monkeypatch.setattr(report, "PLOT", tmp_path / "plot.svg")
    script.run(script.tiny_bench(), ["a", "b", "d"], 60.0, out)
    monkeypatch.setattr(sys, "argv", ["streaming_text_gpu.py", "--plot", "--out", str(out)])
    assert script.main() == 0
    drawn = (tmp_path / "plot.svg").read_text()
    for words in (
        "trained length",
        "million tokens streamed",
        "microseconds of a token",
        "recomputing the window",
    ):
        assert words in drawn
