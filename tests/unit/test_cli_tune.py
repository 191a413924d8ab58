"""`attnopt tune`: what it measures is what decoding would lose, and what it writes is what the other commands read."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from attnopt import cli_tune_work
from attnopt.approximation_rows import Reader, by_sparq, exactly, perplexity
from attnopt.cli import app
from attnopt.cli_tune import Plan, Setting, Tuned, settings, traffic, tune
from attnopt.cli_tune_plot import render
from attnopt.cli_tune_text import share
from attnopt.errors import OptionError, SourceError
from attnopt.kernels.sparq.plain import sparq_reference
from attnopt.options import Options
from attnopt.rule import Sizes
from attnopt.spec import Sparse

MODELS = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, heads=4, kv_heads=2, window=0):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.kv_heads, self.window = heads, kv_heads, window
        self.embed = nn.Embedding(50, 32)
        self.q = nn.ModuleList(nn.Linear(32, 8 * heads) for _ in range(2))
        self.kv = nn.ModuleList(nn.Linear(32, 16 * kv_heads) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(8 * heads, 32) for _ in range(2))

    def attention(self, q, k, v):
        n = q.shape[2]
        k, v = (x.repeat_interleave(self.heads // self.kv_heads, 1) for x in (k, v))
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        if self.window:
            hidden = hidden | torch.ones(n, n, dtype=torch.bool).tril(-self.window)
        return (q @ k.mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v

    def forward(self, ids):
        x = self.embed(ids)
        for q, kv, out in zip(self.q, self.kv, self.out):
            k, v = kv(x).unflatten(-1, (2, self.kv_heads, 8)).permute(2, 0, 3, 1, 4)
            mixed = self.attention(3 * q(x).unflatten(-1, (-1, 8)).transpose(1, 2), k, v)
            x = x + out(mixed.transpose(1, 2).flatten(2))
        return x @ self.embed.weight.mT

IDS = torch.arange(24)[None] * 7 % 50
def model(): return Model().eval(), (IDS,)
def windowed(): return Model(window=5).eval(), (IDS,)
def no_logits(): return nn.Sequential(Model(), nn.Flatten()).eval(), (IDS,)
def tokenizer(): return lambda text: [ord(c) % 50 for c in text]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with models.py and a text in it."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "text.txt").write_text(
        "The quick brown fox jumps over the lazy dog, again and again and again."
    )
    (tmp_path / "ids.json").write_text(json.dumps([n * n % 50 for n in range(40)]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("attnopt_source"):
            del sys.modules[name]


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["tune", *args])


def a_model(**changes: Any) -> Any:
    scope: dict[str, Any] = {}
    exec(MODELS, scope)  # noqa: S102 - the same text as the command line gets
    return scope["Model"](**changes).double().eval()


IDS = torch.randint(0, 50, (1, 20), generator=torch.Generator().manual_seed(3))


def stepwise(model: Any, ids: Tensor, first: int, sparse: Sparse) -> Tensor:
    """The logits of a text whose tokens from `first` on are decoded one by one with the definition of SparQ."""
    length = ids.shape[1]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [
            sparq_reference(
                q[:, :, i : i + 1],
                k[:, :, : i + 1],
                v[:, :, : i + 1],
                rank=sparse.rank if i >= first else 8,
                topk=sparse.topk if i >= first else length,
                local=sparse.local,
                scale=1.0,
            )
            for i in range(q.shape[2])
        ]
        return torch.cat(rows, 2)

    model.attention = attention
    return model(ids)


@pytest.mark.parametrize("kv_heads", [2, 4])
@torch.no_grad()
def test_one_forward_gives_the_logits_of_decoding_step_by_step(kv_heads: int) -> None:
    model, sparse = a_model(kv_heads=kv_heads), Sparse(3, 5, 2)
    reader = Reader.of(model, IDS)
    torch.testing.assert_close(reader.logits(IDS, exactly), model(IDS))
    found = reader.logits(IDS, by_sparq(sparse, 8))
    torch.testing.assert_close(found, stepwise(model, IDS, 8, sparse))
    other = IDS.flip(1)  # what was read holds for any text of the length
    torch.testing.assert_close(reader.logits(other, by_sparq(sparse, 8)), stepwise(model, other, 8, sparse))
    assert not torch.allclose(found[:, 8:], reader.logits(IDS, exactly)[:, 8:], atol=1e-2)


def test_the_perplexity_is_that_of_the_decoded_tokens() -> None:
    logits = torch.zeros(1, 5, 10)
    logits[0, 0, :] = torch.nan  # before the prompt's last position nothing counts
    assert perplexity(logits, torch.arange(5)[None], 2) == pytest.approx(10.0)


def test_all_positions_cost_nothing_and_few_cost_something() -> None:
    model = a_model()
    told: list[str] = []
    found = tune(model, IDS, Plan(ranks=(1, 8), topks=(2, 20), prompt=8), told.append)
    by = {(s.rank, s.topk): s for s in found.settings}
    assert by[1, 20].increase == pytest.approx(0.0, abs=1e-9)
    assert abs(by[1, 2].increase) > 1e-3
    assert (found.sites, found.others, found.tokens, found.prompt) == (2, 0, 20, 8)
    assert len(told) == 5
    with torch.no_grad():
        wanted = perplexity(stepwise(model, IDS, 8, Sparse(1, 2, 0)), IDS, 8)
    assert by[1, 2].perplexity == pytest.approx(wanted)


def test_the_least_traffic_within_the_limit_is_chosen() -> None:
    cheap, fair, dear = (
        Setting(4, k, 1, t, 10.0, i) for k, t, i in ((2, 0.1, 0.2), (4, 0.3, 0.009), (8, 0.5, -0.1))
    )
    tuned = Tuned((dear, cheap, fair), 10.0, None, 0.01, 20, 8, 2, 1)
    assert tuned.chosen == fair
    assert tuned.options() == {"softmax": "sparq", "rank": 4, "topk": 4, "local": 1}
    assert "chosen: rank=4, topk=4" in str(tuned)
    assert "1 attentions of another kind" in str(tuned)
    timed = replace(tuned, settings=(replace(dear, seconds=1e-3), replace(fair, seconds=2e-3)))
    assert timed.chosen == replace(dear, seconds=1e-3)
    none = replace(tuned, limit=-1.0)
    assert none.chosen is None
    assert none.options() == {}
    assert "no setting keeps" in str(none)


def test_traffic_is_that_of_the_paper() -> None:
    sizes = Sizes(1, 8, 8, 1, 1000, 64, 64)
    n, d, r, k = 1000, 64, 16, 100
    assert traffic(sizes, Sparse(r, k, 0)) == pytest.approx((n * r + 2 * k * d + 4 * d) / (2 * n * d + 2 * d))
    grid = list(settings(Plan(), sizes))
    assert len(grid) == 12
    assert all(0 < traffic(sizes, s) < 1 and s.local == s.topk // 4 for s in grid)


def test_the_plot_shows_every_setting_and_the_choice() -> None:
    found = tune(a_model(), IDS, Plan(limit=10.0, ranks=(1, 4), topks=(2, 5)), lambda _: None)
    drawn = render(found)
    assert drawn.startswith("<svg")
    assert drawn.count("<circle") == 5
    assert "chosen: rank 1, topk 2" in drawn
    assert drawn.count("<polyline") == 2


# ---- the command ----


def test_the_choice_is_saved_as_options_that_other_commands_read(folder: Path) -> None:
    made = run(
        "models.py:model", "--text", "text.txt", "--tokens", "24", "--max-ppl-increase", "900%", "-o", "choice.json",
        "--plot", "grid.svg",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "chosen: rank=" in made.stdout
    held = json.loads((folder / "choice.json").read_text())
    assert (held["measured"]["tokens"], held["measured"]["prompt"]) == (24, 12)
    options = Options.parse({}, {"ATTNOPT_OPTIONS": "choice.json"})
    assert options.changed() == {n: v for n, v in held["options"].items() if v != getattr(Options(), n)}
    assert options.softmax == "sparq"
    assert Options.parse({"topk": 77}, {"ATTNOPT_OPTIONS": "choice.json", "ATTNOPT_RANK": "5"}).rank == 5
    shown = CliRunner().invoke(app, ["explain", "models.py:model", "--options", "choice.json", "--json"])
    told = json.loads(shown.stdout)["options"]
    assert {name: told[name] for name in held["options"]} == held["options"]
    assert (folder / "grid.svg").read_text().startswith("<svg")


def test_token_ids_need_no_tokenizer_and_json_holds_all_that_was_measured() -> None:
    made = run(
        "models.py:model", "--text", "ids.json", "--rank", "2", "--topk", "4", "--topk", "30", "--json", "-q"
    )
    body = json.loads(made.stdout)
    assert [(s["rank"], s["topk"]) for s in body["measured"]["settings"]] == [(2, 4), (2, 30)]
    assert body["measured"]["tokens"] == 40


def test_nothing_is_written_where_nothing_is_good_enough(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = Tuned((Setting(2, 4, 1, 0.3, 15.0, 0.5),), 10.0, None, 0.01, 40, 20, 2, 0)
    monkeypatch.setattr(cli_tune_work, "tune", lambda *_: poor)
    made = run("models.py:model", "--text", "ids.json", "-o", "c.json")
    assert made.exit_code == 3
    assert "no setting keeps the perplexity within +1.00%" in made.stdout
    assert not (folder / "c.json").exists()


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("models.py:model", "--text", "none.txt"), 2, "no such file"),
        (("models.py:model", "--text", "text.txt", "--tokenizer", "models.py:nothing"), 2, "no tokenizer"),
        (("models.py:model", "--text", "models.py", "--max-ppl-increase", "much"), 2, "wanted a share"),
        (("models.py:model", "--text", "ids.json", "--prompt", "40"), 2, "a prompt of 40 tokens"),
        (("models.py:windowed", "--text", "ids.json"), 2, "no causal softmax attention"),
        (("models.py:no_logits", "--text", "ids.json"), 2, "wanted logits"),
        (("models.py:model", "--text", "ids.json", "-o", "text.txt"), 2, "text.txt"),
        (("models.py:model", "--text", "ids.json", "--device", "tpu"), 2, "wanted auto, cpu or cuda"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(args: tuple[str, ...], code: int, message: str) -> None:
    made = run(*args)
    assert made.exit_code == code, made.output
    assert message in made.stderr


@pytest.mark.parametrize(("text", "value"), [("1%", 0.01), ("0.5 %", 0.005), ("0.02", 0.02), ("0", 0.0)])
def test_a_share_is_read_from_percent_or_a_number(text: str, value: float) -> None:
    assert share(text) == pytest.approx(value)
    with pytest.raises(OptionError, match="wanted a share"):
        share("-1%")


@pytest.mark.parametrize("held", ["[]", "[1, true]", '{"a": 1}', "no"])
def test_ids_are_a_list_of_whole_numbers(folder: Path, held: str) -> None:
    from attnopt.cli_tune_text import token_ids

    (folder / "ids.json").write_text(held)
    with pytest.raises(SourceError, match=r"ids\.json"):
        token_ids(folder / "ids.json", 5, None, "models.py:model")


@pytest.mark.parametrize("held", ["[1]", "no", '{"options": 3}', '{"rnk": 3}'])
def test_a_file_of_options_that_holds_something_else_is_refused(folder: Path, held: str) -> None:
    (folder / "o.json").write_text(held)
    with pytest.raises(OptionError):
        Options.parse({}, {"ATTNOPT_OPTIONS": "o.json"})
