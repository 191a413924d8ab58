"""Graphs that cannot hold an attention cost a look at the names of their calls, and nothing more."""

import pytest
import torch
from compiling import compiled, reports_after
from graphs import aten_graph, dynamo_graphs
from torch import Tensor, nn

import attnopt
from attnopt import pipeline
from attnopt.registry import rules
from attnopt.shadow_triage import HARMLESS, may_hold_attention, name_of

#: Where a loop or a quotient may end; the products inside them have other names.
ENDS = {"linear loop", "linear recurrence"}


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(nn.functional.gelu(self.up(x)) * 0.5)).clamp(max=3)


def test_a_graph_without_attention_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "trace", None)
    model, x, before = Plain(), torch.randn(3, 4), attnopt.reports()
    assert torch.equal(compiled(model)(x), model(x))
    report = reports_after(before)
    assert report.warnings == ()
    (graph,) = report.graphs
    assert graph.nodes_before == graph.nodes_after > 3
    assert graph.seconds == {}


def test_where_a_rule_starts_is_never_harmless() -> None:
    for rule in rules():
        assert rule.name in ENDS or not {name_of(anchor) for anchor in rule.anchors} & HARMLESS, rule.name


@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
        nn.functional.scaled_dot_product_attention,
        lambda q, k, v: torch.einsum("bqd,bkd,bke->bqe", q, k, v),
        lambda q, k, v: ((q.unsqueeze(2) * k.unsqueeze(1)).sum(-1).tril().unsqueeze(-1) * v.unsqueeze(1)).sum(
            2
        ),
        lambda q, k, v: nn.functional.linear(nn.functional.linear(q[0], k[0]), v[0].mT),
        lambda q, k, v: (q.exp() * k).cumsum(1) * v,
    ],
)
def test_every_way_to_attend_is_read(function: object) -> None:
    inputs = torch.randn(3, 2, 5, 5).unbind()
    assert may_hold_attention(aten_graph(function, *inputs))
    assert all(map(may_hold_attention, dynamo_graphs(function, *inputs)))
