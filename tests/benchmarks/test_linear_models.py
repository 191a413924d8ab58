"""The models behind benchmarks/linear_model_gpu.py, and its script, at sizes that a CPU can do."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from compiling import reports_after
from oracle import assert_same
from torch import Tensor, nn

import attnopt

#: torch's own compiler asks for the gradient of what passes from layer to layer.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def models(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("_linear_models")


@pytest.fixture
def script(benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark("linear_model_gpu")


def decoder(
    models: ModuleType, layer: str = "TransNormerLayer", dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Three small layers; the same weights for each layer and dtype that have the same shapes."""
    torch.manual_seed(0)
    sizes = models.Sizes(layers=3, heads=2, dim=16, inner=48, llama_inner=56, vocabulary=97)
    place = models.Place(torch.device("cpu"), torch.float32)
    return models.Decoder(getattr(models, layer), sizes, place).to(dtype)


def ids(length: int = 256) -> Tensor:
    return torch.randint(0, 97, (2, length), generator=torch.Generator().manual_seed(1))


def trained(
    models: ModuleType, model: nn.Module, run_layer: Callable[..., Tensor], given: Tensor
) -> list[Tensor]:
    """The loss of one step, and its gradients."""
    model.zero_grad()
    hidden = model(given, run_layer)
    loss = models.chunked_loss(hidden, model.embedding.weight, given.roll(-1, 1), 200)
    loss.backward()
    return [loss.detach().view(1), *(p.grad.clone() for p in model.parameters())]


def assert_like(got: list[Tensor], exact: list[Tensor], eager: list[Tensor]) -> None:
    for n, (mine, want, plain) in enumerate(zip(got, exact, eager, strict=True)):
        assert_same(*(x.flatten() for x in (mine, want, plain)), what=f"tensor {n}")


def test_both_models_have_as_many_parameters(models: ModuleType) -> None:
    place = models.Place(torch.device("meta"), torch.bfloat16)
    counts = {
        layer: models.parameters_of(models.Decoder(getattr(models, layer), models.Sizes(), place))
        for layer in ("TransNormerLayer", "LlamaLayer")
    }
    assert counts["TransNormerLayer"] == 381_681_664
    assert counts["LlamaLayer"] == pytest.approx(counts["TransNormerLayer"], rel=0.01)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_training_through_attnopt_is_training(models: ModuleType, inner: str) -> None:
    earlier = attnopt.reports()
    options = {"inner": inner, "strict": True}
    run = torch.compile(models.call_layer, backend="attnopt", options=options, dynamic=False)
    got = trained(models, decoder(models), run, ids())
    eager = trained(models, decoder(models), models.call_layer, ids())
    exact = trained(models, decoder(models, dtype=torch.float64), models.call_layer, ids())
    assert_like(got, exact, eager)
    report = reports_after(earlier)
    assert [site.kernel for site in report.attention] == ["lightning"], "one compilation for all layers"
    assert report.warnings == ()


def test_the_whole_model_compiles_as_one(models: ModuleType) -> None:
    earlier = attnopt.reports()
    model, given = decoder(models), ids()
    whole = torch.compile(
        lambda given: model(given, models.call_layer),
        backend="attnopt",
        options={"inner": "aot_eager", "strict": True},
        fullgraph=True,
    )
    torch.testing.assert_close(whole(given), model(given, models.call_layer))
    assert [site.kernel for site in reports_after(earlier).attention] == ["lightning"] * 3


@pytest.fixture
def fla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the package; like its function, this one is not compiled."""
    called = SimpleNamespace(chunk_simple_gla=torch.compiler.disable(as_fla_does))
    for name, module in (("fla", None), ("fla.ops", None), ("fla.ops.simple_gla", called)):
        monkeypatch.setitem(sys.modules, name, module or SimpleNamespace())


@pytest.mark.usefixtures("fla")
def test_fla_is_called_with_what_computes_the_same(models: ModuleType) -> None:
    got = trained(models, decoder(models, "FlaLayer"), models.call_layer, ids(40))
    eager = trained(models, decoder(models), models.call_layer, ids(40))
    exact = trained(models, decoder(models, dtype=torch.float64), models.call_layer, ids(40))
    assert_like(got, exact, eager)


def as_fla_does(q: Tensor, k: Tensor, v: Tensor, *, g_gamma: Tensor, scale: float) -> tuple[Tensor, None]:
    """chunk_simple_gla as it is documented, token by token: (B, T, H, D), log decay g_gamma (H,)."""
    state, rows = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        state = state * g_gamma.exp()[:, None, None] + k[:, t, :, :, None] * v[:, t, :, None, :]
        rows.append((q[:, t, :, None, :] @ state)[:, :, 0] * scale)
    return torch.stack(rows, 1), None


@pytest.mark.parametrize("layer", ["TransNormerLayer", "LlamaLayer"])
def test_no_layer_reads_the_future(models: ModuleType, layer: str) -> None:
    model, given = decoder(models, layer), ids(60)
    torch.testing.assert_close(
        model(given, models.call_layer)[:, :25], model(given[:, :25], models.call_layer)
    )


def test_the_loss_in_chunks_is_the_loss(models: ModuleType) -> None:
    hidden, weight = torch.randn(2, 50, 8), torch.randn(97, 8)
    whole = models.cross_entropy_sum(hidden.flatten(0, 1), weight, ids(50).flatten()) / 100
    torch.testing.assert_close(models.chunked_loss(hidden, weight, ids(50), 30), whole)


LONG = """
import resource, torch
from _linear_models import *
sizes = Sizes(layers=2, heads=2, dim=8, inner=32, llama_inner=32, vocabulary=64)
model = Decoder(TransNormerLayer, sizes, Place(torch.device("cpu"), torch.float32))
options = {"inner": "aot_eager", "strict": True}
run = torch.compile(call_layer, backend="attnopt", options=options, dynamic=False)
def step(length):
    ids = torch.randint(0, 64, (1, length))
    chunked_loss(model(ids, run), model.embedding.weight, ids, 8192).backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(-step(256) + step(65536))
"""


def test_no_pair_of_tokens_is_held_at_65536() -> None:
    """N x N once, in bytes, would be 4 GiB; reading, checking, tracing and a step all together take less than 0.5."""
    found = subprocess.run(
        [sys.executable, "-c", LONG], capture_output=True, text=True, check=False, cwd=BENCHMARKS
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 2**29


# The script.


def test_points_are_kept_and_not_run_again(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, out = replace(script.TINY, forms=("attnopt", "softmax")), tmp_path / "out.json"
    first = script.run_all(replace(plan, lengths=(128,)), out, 1000.0)
    monkeypatch.setattr(
        script, "run_point", lambda form, length, _plan: {"form": form, "length": length, "error": "x"}
    )
    both = script.run_all(plan, out, 1000.0)
    assert [(r["form"], r["length"], "error" in r) for r in both] == [
        ("attnopt", 128, False),
        ("softmax", 128, False),
        ("attnopt", 512, True),
        ("softmax", 512, True),
    ]
    assert both[:2] == first
    assert first[0]["sites"] == ["rewritten lightning: linear scale=1 causal decay per head"]
    assert first[0]["losses"][-1] < first[0]["losses"][0]
    assert json.loads(out.read_text())["rows"] == both


def test_other_settings_start_anew(script: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    plan = replace(script.TINY, forms=("softmax",), lengths=(128,))
    script.run_all(plan, out, 1000.0)
    assert len(script.run_all(replace(plan, chunk=100), out, -1.0)) == 0
    assert len(script.run_all(plan, out, -1.0)) == 1


def test_what_cannot_run_is_told(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    row = script.run_or_tell("fla", 128, script.TINY)
    assert "fla" in row["error"]
    assert "error" not in script.run_or_tell("plain", 128, script.TINY)


@pytest.mark.usefixtures("fla")
def test_the_forms_that_compute_the_same_agree(script: ModuleType) -> None:
    rows = [script.run_point(form, 128, script.TINY) for form in ("attnopt", "plain", "fla")]
    assert {row["parameters"] for row in rows} == {rows[0]["parameters"]}
    found = script.summary(rows)
    assert found["largest_relative_difference_of_the_first_loss"] < 1e-6
    assert found["largest_relative_difference_of_the_gradient_norm"] < 1e-5


def test_the_figures_and_the_plot(
    script: ModuleType,
    benchmark: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speeds = {"attnopt": (100.0, 97.0), "softmax": (110.0, 12.0)}
    rows = [
        {
            "form": form, "length": length, "tokens_per_second": speed, "peak_bytes": 2**34,
            "losses": [1.0], "gradient_norm": 1.0,
        }
        for form, both in speeds.items()
        for length, speed in zip((1024, 131072), both, strict=True)
    ]  # fmt: skip
    found = script.summary(rows)
    assert found["kept"] == {"attnopt": 0.97, "softmax": pytest.approx(12 / 110)}
    assert found["times_as_fast_as"]["softmax"] == {
        "1024": pytest.approx(100 / 110),
        "131072": pytest.approx(97 / 12),
    }
    assert "0.970" in script.table(rows)
    monkeypatch.setattr(benchmark("_linear_model_report"), "PLOT", tmp_path / "plot.svg")
    script.plot([*rows, {"form": "fla", "length": 1024, "error": "not installed"}])
    assert (tmp_path / "plot.svg").read_text().count("thousand tokens per second") == 1
