"""Decays that come in as tables in buffers: read from their values, and compared again when they may have changed."""

import warnings

import pytest
import torch
from compiling import assert_runs_agree, reports_after, run
from loop_spellings import slopes
from torch import Tensor, nn
from transformers.models.minimax.configuration_minimax import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxForCausalLM

import attnopt
from attnopt.report import Report

BLOCK = 8


class Lightning(nn.Module):
    """Lightning Attention by blocks with tables of decays, made once."""

    def __init__(self, wrong: float = 1.0) -> None:
        super().__init__()
        slope, place = slopes(), torch.arange(1.0, BLOCK + 1)
        apart = slope * (place[:, None] - place[None, :])
        self.slope = nn.Buffer(slope)
        self.on_q = nn.Buffer(torch.exp(-slope * place[:, None]))
        self.on_k = nn.Buffer(torch.exp(-slope * (BLOCK - place[:, None])) * wrong)
        self.pairs = nn.Buffer(torch.exp(torch.where(apart >= 0, -apart, -torch.inf)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, state = [], q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        for start in range(0, q.shape[2], BLOCK):
            q_n, k_n, v_n = (x[:, :, start : start + BLOCK] for x in (q, k, v))
            m = q_n.shape[2]
            rows.append((q_n * self.on_q[:, :m]) @ state + (q_n @ k_n.mT * self.pairs[:, :m, :m]) @ v_n)
            state = state * torch.exp(-self.slope * m) + (k_n * self.on_k[:, -m:]).mT @ v_n
        return torch.cat(rows, 2)


def inputs(length: int = 20) -> list[Tensor]:
    return [torch.randn(2, 3, length, 4) for _ in range(3)]


def verdicts(before: tuple[Report, ...]) -> list[str]:
    return [site.verdict for site in reports_after(before).attention]


@pytest.fixture
def model() -> Lightning:
    torch._dynamo.reset()
    return Lightning()


@pytest.mark.parametrize("length", [20, 16, 5])
def test_tables_are_read(model: Lightning, length: int) -> None:
    before = attnopt.reports()
    given = inputs(length)
    compiled = torch.compile(model, backend="attnopt", options={"inner": "aot_eager"})
    got = run(compiled, given, 3)
    assert verdicts(before) == ["rewritten"]
    assert_runs_agree(got, run(Lightning().double(), [x.double() for x in given], 3), run(model, given, 3))


def test_a_table_that_holds_something_else_is_refused() -> None:
    torch._dynamo.reset()
    before, model, given = attnopt.reports(), Lightning(wrong=1.001), inputs()
    compiled = torch.compile(model, backend="attnopt", options={"inner": "eager"})
    torch.testing.assert_close(compiled(*given), model(*given))
    assert verdicts(before) == ["refused"]


def test_a_table_that_changes_later_is_noticed(model: Lightning) -> None:
    given = inputs()
    compiled = torch.compile(model, backend="attnopt", options={"inner": "eager"})
    torch.testing.assert_close(compiled(*given), model(*given))
    with torch.no_grad():
        model.on_k.mul_(0.9)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = compiled(*given)
    torch.testing.assert_close(got, model(*given))
    assert any("has changed" in str(w.message) for w in said)


def test_other_slopes_with_their_own_tables_need_no_new_reading(model: Lightning) -> None:
    given = inputs()
    compiled = torch.compile(model, backend="attnopt", options={"inner": "eager"})
    compiled(*given)
    with torch.no_grad():
        for table in (model.slope, model.on_q, model.on_k, model.pairs):
            table.copy_(2 * table if table is model.slope else table.square())
    torch.testing.assert_close(compiled(*given), model(*given))


def test_a_model_as_transformers_spells_it() -> None:
    torch._dynamo.reset()
    config = MiniMaxConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_hidden_layers=4, block_size=8,
        vocab_size=64, intermediate_size=32, num_local_experts=2,
    )  # fmt: skip
    model, before = MiniMaxForCausalLM(config).eval(), attnopt.reports()
    ids, mask = torch.randint(0, 64, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0

    def logits(ids: Tensor) -> Tensor:
        return model(ids, attention_mask=mask, use_cache=False).logits

    compiled = torch.compile(logits, backend="attnopt", options={"inner": "eager"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(ids), logits(ids), rtol=1e-4, atol=1e-5)
    linear = [s for s in reports_after(before).attention if s.family == "linear"]
    assert [s.verdict for s in linear] == ["rewritten"] * config.layer_types.count("linear_attention")
