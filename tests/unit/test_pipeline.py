"""One graph through all passes: what is read where, what is decided, what stays of the graph."""

from dataclasses import replace

import pytest
import torch
from graphs import aten_graph, found_in, nodes_of, shadow_of
from torch import Tensor

from attnopt import pipeline, verify
from attnopt.options import Options
from attnopt.passes.softmax import RULE as SOFTMAX
from attnopt.pipeline import describe, eager_cost, optimise, read
from attnopt.rule import Reject, Site

aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * 0.25, -1) @ v


def tensors(heads: int = 4) -> tuple[Tensor, ...]:
    return torch.randn(2, 4, 5, 8), torch.randn(2, heads, 7, 8), torch.randn(2, heads, 7, 6)


class Other:
    """A second rule for the same spellings; `change` is what it reads differently."""

    name = "other"
    anchors = SOFTMAX.anchors

    def __init__(self, **change: object) -> None:
        self.change = change

    def read(self, anchor: object, shadow: object) -> Site:
        site = SOFTMAX.read(anchor, shadow)
        return replace(site, rule=self.name, spec=replace(site.spec, **self.change))


class Never:
    """A rule that got as far as `depth`."""

    anchors = SOFTMAX.anchors

    def __init__(self, name: str, depth: int) -> None:
        self.name = name
        self.depth = depth

    def read(self, anchor: object, shadow: object) -> Site:
        raise Reject(f"{self.name} stopped", depth=self.depth)


def test_two_rules_that_read_differently_refuse_each_other() -> None:
    (found,) = read(shadow_of(attend, *tensors()), [SOFTMAX, Other(scale=0.5)])
    assert found.site is None
    assert "softmax, other read it differently" in found.reject.reason


def test_two_rules_that_agree_are_one() -> None:
    (found,) = read(shadow_of(attend, *tensors()), [SOFTMAX, Other()])
    assert found.site is not None


def test_the_rule_that_got_furthest_is_named() -> None:
    (found,) = read(shadow_of(attend, *tensors()), [Never("early", 1), Never("late", 5), Never("middle", 3)])
    assert (found.rule, found.reject.reason) == ("late", "late stopped")


def test_a_rule_may_be_silent() -> None:
    assert list(read(shadow_of(attend, *tensors()), [Never("silent", -1)])) == []


def test_what_the_outputs_do_not_need_is_not_read() -> None:
    def idle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend(q, k, v)
        return q + 1

    assert found_in(idle, *tensors()) == []


def test_sites_come_in_the_order_of_the_graph() -> None:
    def two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v) + torch.softmax(q @ k.mT * 0.75, -1) @ v

    assert [found.site.spec.scale for found in found_in(two, *tensors())] == [0.25, 0.75]


def test_nothing_of_a_rewritten_attention_stays() -> None:
    def stacked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(3):
            q = torch.softmax(q @ k.mT * 0.25, -1) @ k
        return q

    module = aten_graph(stacked, *tensors())
    outcome = optimise(module, Options(), gradient=False)
    assert nodes_of(module, aten.softmax.int) == nodes_of(module, aten.matmul.default) == []
    assert len(nodes_of(module, aten.scaled_dot_product_attention.default)) == 3
    assert (outcome.graphs[0].nodes_after, len(outcome.edits)) == (len(module.graph.nodes), 3)


def test_equal_sites_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sum(torch.softmax(q @ (k + n).mT * 0.25, -1) @ v for n in range(4))

    calls, check = [], verify._validate
    monkeypatch.setattr(verify, "_validate", lambda *args: calls.append(args) or check(*args))
    optimise(aten_graph(layers, *tensors()), Options(), gradient=False)
    assert len(calls) == 1


def test_a_misreading_is_refused_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "rules", lambda: (Other(scale=0.25 * (1 + 1e-6)),))
    module = aten_graph(attend, *tensors())
    before = str(module.graph)
    (site,) = optimise(module, Options(), gradient=False).sites
    assert (site.verdict, site.error is not None and site.error > 1e-9) == ("refused", True)
    assert "differs" in site.reason
    assert str(module.graph) == before


def test_a_kernel_knows_shapes_dtypes_and_device() -> None:
    site = found_in(attend, *(x.bfloat16() for x in tensors()))[0].site
    meta = describe(site, gradient=True)
    assert {name: m.shape for name, m in meta.operands.items()} == {
        "q": (2, 4, 5, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 6),
    }  # fmt: skip
    assert {m.dtype for m in meta.operands.values()} == {torch.bfloat16}
    assert (meta.gradient, meta.device.type) == (True, "cpu")


def test_symbolic_sizes_are_known_by_their_hints() -> None:
    meta = describe(found_in(attend, *tensors(), dynamic=True)[0].site, gradient=False)
    assert meta.operands["k"].shape == (2, 4, 7, 8)


def test_the_plain_spelling_writes_and_reads_all_pairs_twice() -> None:
    meta = describe(found_in(attend, *tensors())[0].site, gradient=False)
    pairs, rows = 2 * 4 * 5 * 7, 2 * 4 * (5 + 7) * (8 + 6)
    assert eager_cost(meta) == {"bytes": 4.0 * (rows + 4 * pairs), "flops": 2.0 * pairs * (8 + 6)}
