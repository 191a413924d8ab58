"""What benchmarks/sparq_quality.py measures: methods, traffic and tasks, on a model that a CPU can do at once."""

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from imported("_sparq_tasks", monkeypatch)


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    yield from imported("sparq_quality", monkeypatch)


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module(name)
    for module in ("_sparq_tasks", "sparq_quality", "_smollm2_gpu", "_record"):
        sys.modules.pop(module, None)


def text(n: int = 400) -> Tensor:
    return torch.randint(0, 49_152, (n,), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("t", [1 / 2, 1 / 4, 1 / 8])
def test_methods_read_what_they_say(tasks: ModuleType, t: float) -> None:
    n, d = 3584, 64
    sparq, window = tasks.sparq_at(t, n, d), tasks.window_at(t, n, d)
    dense = 2 * n * d + 2 * d
    assert sparq.traffic == (n * sparq.rank + 2 * sparq.topk * d + 4 * d) / dense
    assert window.traffic == (2 * (window.window + tasks.SINKS) * d + 2 * d) / dense
    assert all(0.98 * t < method.traffic <= t for method in (sparq, window))


def test_methods_that_see_all_are_dense(tasks: ModuleType) -> None:
    q, k, v = torch.randn(1, 6, 40, 16), torch.randn(1, 2, 40, 16), torch.randn(1, 2, 40, 16)
    dense = tasks.Dense().attend(q, k, v, 10)
    for method in (tasks.Sparq(1, 40, 1.0), tasks.Window(40, 1.0)):
        torch.testing.assert_close(method.attend(q, k, v, 10), dense)
    for method in (tasks.Sparq(4, 8, 0.3), tasks.Window(4, 0.3)):
        found = method.attend(q, k, v, 10)
        torch.testing.assert_close(found[:, :, :10], dense[:, :, :10])
        assert not torch.allclose(found[:, :, 10:], dense[:, :, 10:], atol=1e-2)


def test_what_is_decoded_and_asked_for_stands_in_the_text(tasks: ModuleType) -> None:
    windows = list(tasks.reading(text(), 100))
    assert [(len(w.ids[0]), w.first) for w in windows] == [(100, 75)] * len(windows)
    assert torch.equal(torch.cat([w.ids[0, 75:] for w in windows]), text()[75 : 75 + 25 * len(windows)])
    copy = tasks.copying(text(), 300, seed=1)
    repeated, body = copy.ids[0, copy.first :], copy.ids[0, : copy.first]
    assert len(copy.ids[0]) == 300
    assert len(repeated) == tasks.CUE + tasks.COPIED
    assert (body.unfold(0, len(repeated), 1) == repeated).all(1).any()
    needle = tasks.needles(text(), 300, seed=1)
    ids = needle.ids[0]
    assert len(ids) == 300
    question, number = ids[needle.first : needle.asked], ids[needle.asked :]
    assert len(number) == tasks.DIGITS
    assert all(0 <= n - tasks.DIGIT < 10 for n in number.tolist())
    told = ids[: needle.first].unfold(0, len(question) + tasks.DIGITS, 1)
    assert (told == torch.cat([question, number])).all(1).sum() == 1


def test_a_token_is_right_after_the_right_ones_before_it(tasks: ModuleType) -> None:
    trial = tasks.Trial(torch.tensor([[9, 9, 9, 1, 2, 3, 4]]), first=2, asked=3)
    said = torch.tensor([0, 1, 2, 0, 4, 0])  # from position 1 on: about positions 2, 3, ...
    logits = torch.nn.functional.one_hot(said, 10).float()[None]
    assert tasks.right(logits, trial).tolist() == [True, True, False, True]
    assert tasks.loss(logits, trial).argmax() == 2


def test_the_script_measures_plots_and_writes(
    quality: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = quality.smollm2.Sizes(layers=1, width=32, heads=4, kv_heads=2, inner=16)
    model = quality.smollm2.random_model(sizes, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(quality.smollm2, "load", lambda *_: model)
    monkeypatch.setattr(
        quality, "texts", lambda _: torch.cat([text(50), torch.tensor(quality.OPENING), text()])
    )
    out, drawn = tmp_path / "out.json", tmp_path / "out.svg"
    given = [
        "--weights",
        str(tmp_path),
        "--tokens",
        "272",
        "--budget",
        "0",
        "--out",
        str(out),
        "--plot",
        str(drawn),
    ]
    monkeypatch.setattr(sys, "argv", ["sparq_quality.py", *given])
    quality.main()
    tasks: dict[str, Any] = json.loads(out.read_text())["tasks"]
    names = ["dense", *(f"{kind} 1/{n}" for n in (2, 4, 8) for kind in ("sparq", "window"))]
    assert [list(rows) for rows in tasks.values()] == [names] * 3
    assert all(row["tokens"] == 68 for row in tasks["perplexity"].values())
    assert "<svg" in drawn.read_text()


def test_emma_begins_where_its_opening_stands(quality: ModuleType) -> None:
    opening = torch.tensor(quality.OPENING)
    assert torch.equal(quality.from_emma(torch.cat([text(30), opening, text(9)]))[: len(opening)], opening)
