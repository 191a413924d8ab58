"""attnopt rewrite --evaluate: the perplexity before and after on a text, in print and in the report."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from attnopt import cli_sources
from attnopt.cli import app
from attnopt.report import Report

MODELS = '''
import torch
from torch import nn

class Model(nn.Module):
    """A language model of one causal attention."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.head = nn.Embedding(50, 16), nn.Linear(16, 50)
        self.heads = nn.Linear(16, 48)

    def forward(self, ids):
        x = self.tokens(ids)
        q, k, v = self.heads(x).view(*ids.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
        hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
        x = x + ((q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(1, 2).flatten(2)
        return self.head(x)

def factory():
    return Model().eval(), (torch.zeros(2, 24, dtype=torch.int64),)

def vision():
    return nn.Linear(4, 4), (torch.zeros(1, 4),)
'''
FLAGS = ("--softmax", "streaming", "--sinks", "1", "--window", "3")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "text.txt").write_text("It is a truth universally acknowledged, that a single man. " * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(words))
    return done.exit_code, done.stdout, done.stderr


def perplexity(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        logits = model(ids)[:, :-1]
    return math.exp(float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))


def test_it_is_the_perplexity_of_both_programs_on_the_text(folder: Path) -> None:
    code, out, _ = run("rewrite", "models.py:factory", "-o", "out.pt2", "--evaluate", "text.txt", *FLAGS)
    assert code == 0
    assert "evaluated on text.txt" in out
    assert "bytes modulo 50" in out
    found = Report.from_json((folder / "out.pt2.report.json").read_text()).evaluation
    model = cli_sources.load("models.py:factory").runnable()
    pieces = torch.tensor(list((folder / "text.txt").read_bytes())) % 50
    ids = pieces[: len(pieces) // 48 * 48][: 32 * 48].view(-1, 24)
    after = torch.export.load(folder / "out.pt2").module()
    changed = torch.cat([after(part).detach() for part in ids.split(2)])
    assert found["perplexity_before"] == pytest.approx(perplexity(model, ids), rel=1e-5)
    assert found["perplexity_after"] == pytest.approx(perplexity(lambda _: changed, ids), rel=1e-5)  # type: ignore[arg-type]
    assert float(found["logits_error"]) > 1e-3
    assert (found["tokens"], found["length"]) == (ids[:, 1:].numel(), 24)


def test_an_exact_rewrite_changes_nothing() -> None:
    code, out, _ = run("rewrite", "models.py:factory", "--dry-run", "--json", "--evaluate", "text.txt")
    found = json.loads(out)["report"]["evaluation"]
    assert code == 0
    assert abs(found["perplexity_change"]) < 1e-6
    assert found["logits_error"] < 1e-5


def test_a_list_of_token_ids_is_a_text(folder: Path) -> None:
    (folder / "ids.json").write_text(json.dumps(list(range(50)) * 4))
    code, out, _ = run("rewrite", "models.py:factory", "--dry-run", "--json", "--evaluate", "ids.json")
    assert code == 0
    assert json.loads(out)["report"]["evaluation"]["tokenizer"] == "token ids of the file"


def test_a_folder_brings_its_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: n for n, word in enumerate(["[UNK]", "It", "is", "a", "truth", "single", "man", ".", ","])}
    made = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))  # noqa: S106 - no password
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]").save_pretrained(folder / "llama")  # noqa: S106
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    LlamaForCausalLM(config).save_pretrained(folder / "llama")
    code, out, _ = run("rewrite", "llama", "--dry-run", "--json", "--evaluate", "text.txt", *FLAGS)
    assert code == 0
    body = json.loads(out)["report"]
    assert body["evaluation"]["tokenizer"] == "tokenizer of llama"
    assert [site["exact"] for site in body["sites"]] == [False]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("models.py:vision", "--evaluate", "text.txt"), "wants a language model with one input"),
        (("models.py:factory", "--evaluate", "nothing.txt"), "no such file"),
        (("models.py:factory", "--evaluate", "short.txt"), "has 3 tokens"),
    ],
)
def test_what_cannot_be_evaluated_is_said(words: tuple[str, ...], said: str, folder: Path) -> None:
    (folder / "short.txt").write_text("abc")
    code, _, error = run("rewrite", *words, "--dry-run")
    assert code == 2
    assert said in error
