"""examples/dedicated_sink.py: a sink logit of each head is served exactly by the streaming cache."""

import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.caches import StreamingCache

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module("dedicated_sink")
    sys.modules.pop("dedicated_sink")


def model_of(sink: ModuleType, *, has_sink: bool) -> Any:
    """In fp64, its logits different in each head."""
    model = sink.ByteModel(has_sink=has_sink).double().eval().requires_grad_(requires_grad=False)
    for block in model.blocks:
        if has_sink:
            block.attention.logits.copy_(torch.linspace(-2, 3, sink.HEADS))
    return model


def by_definition(sink: ModuleType, attention: Any, x: Tensor, window: int) -> Tensor:
    """softmax with one more logit that has no value, N x N: the last `window` tokens are seen."""
    at = torch.arange(x.shape[1])
    q, k, v = (
        y.unflatten(-1, (sink.HEADS, sink.HEAD)).transpose(1, 2)
        for y in attention.project(x).chunk(3, dim=-1)
    )
    q, k = (attention.rotary.turned(y, at[None]) for y in (q, k))
    seen = (at <= at[:, None]) & (at > at[:, None] - window)
    scores = (q @ k.mT / math.sqrt(sink.HEAD)).masked_fill(~seen, -math.inf)
    logits = attention.logits.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, logits], dim=-1).softmax(-1)[..., :-1]
    return attention.out((weights @ v).transpose(1, 2).flatten(2))


def test_a_piece_is_what_sink_logits_define(sink: ModuleType) -> None:
    attention = model_of(sink, has_sink=True).blocks[0].attention
    x = torch.randn(2, 30, sink.WIDTH, dtype=torch.float64)
    torch.testing.assert_close(attention(x, None, 0), by_definition(sink, attention, x, 30))


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [20, 1, 1, 28]])
def test_a_stream_is_what_sink_logits_define(sink: ModuleType, sizes: list[int]) -> None:
    attention = model_of(sink, has_sink=True).blocks[0].attention
    x = torch.randn(2, 50, sink.WIDTH, dtype=torch.float64)
    cache = StreamingCache(sinks=1, window=9, rotary=attention.rotary)
    found = torch.cat([attention(part, cache, 0) for part in x.split(sizes, dim=1)], dim=1)
    torch.testing.assert_close(found, by_definition(sink, attention, x, 9))
    dropped = attention(x, StreamingCache(sinks=0, window=9, rotary=attention.rotary), 0)
    assert float((dropped - found)[:, 20:].abs().max()) > 1e-3


@pytest.mark.parametrize("has_sink", [False, True])
def test_a_short_stream_is_a_piece(sink: ModuleType, has_sink: bool) -> None:
    model = model_of(sink, has_sink=has_sink)
    ids = torch.randint(sink.BYTES, (1, model.piece))
    cache = StreamingCache(sinks=4, window=sink.CONTEXT - 4, rotary=model.rotary)
    torch.testing.assert_close(model(ids, cache), model(ids))


def test_recomputation_predicts_the_same_bytes(sink: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(sink.BYTES, (1, 200))
    for has_sink in (False, True):
        model = model_of(sink, has_sink=has_sink)
        # A model that reads one byte only: a stream and a fresh piece give the same.
        monkeypatch.setattr(sink, "CONTEXT", 1 + has_sink)
        assert sink.streamed(model, ids, int(has_sink)) == pytest.approx(sink.recomputed(model, ids))


def test_training_learns_and_the_table_is_made(sink: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    data = torch.tensor(list(sink.TEXT.read_bytes()))
    model = sink.trained(data[:4000], has_sink=True, steps=8, seed=0)
    fresh = sink.ByteModel(has_sink=True)
    ids = data[None, :500]
    assert sink.streamed(model, ids, 1) < 0.5 * sink.streamed(fresh, ids, 1)
    assert any(bool((block.attention.logits != 0).any()) for block in model.blocks)
    monkeypatch.setattr(sink, "HELD_OUT", 300)
    table = sink.study(sink.TEXT.read_bytes()[:3000], steps=1, seed=0)
    assert len(table.rows) == 2
    assert [str(column.header) for column in table.columns][1:] == ["0", "1", "2", "4", "recomputed"]
