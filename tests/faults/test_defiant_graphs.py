"""Graphs that are hard to read: huge, deep, forked, branching, of unknown size, or without what the tracer needs."""

import time
import warnings

import pytest
import torch
from compiling import check_like_eager, compiled
from graphs import aten_graph, dynamo_graphs
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnopt import reports
from attnopt.backend import attnopt, rewrite_graph
from attnopt.options import Options
from attnopt.passes.softmax import SoftmaxRule
from attnopt.rule import Reject

PATIENCE = 30.0  # seconds; an exponential reader would take hours


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 4, 6, 8, dtype=dtype) for _ in range(3))


def test_scores_that_fork_again_and_again_are_given_up_at_once() -> None:
    def forked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = q @ k.mT
        for _ in range(60):
            x = x + x * 0.5
        return x.softmax(-1) @ v

    start = time.perf_counter()
    report = check_like_eager(forked, tensors())
    assert time.perf_counter() - start < PATIENCE
    assert report.sites[0].verdict == "kept"
    assert "made of the scores" in report.sites[0].reason


@pytest.mark.parametrize("length", [150, 1500])
def test_a_chain_is_read_up_to_a_limit(length: int) -> None:
    def chained(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        x = q @ k.mT
        for _ in range(length):
            x = x * 1.001
        return x.softmax(-1) @ v

    module = aten_graph(chained, *tensors())
    report, _ = rewrite_graph(module, Options(), gradient=False)
    assert report.warnings == ()
    assert [site.verdict for site in report.sites] == (["rewritten"] if length < 200 else ["rejected"])


def test_a_large_graph_around_an_attention_is_left_as_it_is() -> None:
    def surrounded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        for _ in range(500):
            q = (q + 0.001).relu()
        out = attend(q, k, v)
        for _ in range(500):
            out = (out * 1.001).tanh()
        return out

    module = aten_graph(surrounded, *tensors())
    start = time.perf_counter()
    report, _ = rewrite_graph(module, Options(), gradient=False)
    assert time.perf_counter() - start < PATIENCE
    assert [site.verdict for site in report.sites] == ["rewritten"]
    torch.testing.assert_close(module(*(held := tensors())), surrounded(*held))


def test_both_branches_of_a_condition_are_read() -> None:
    def branching(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cond(q.sum() > 0, attend, lambda q, k, v: attend(-q, k, v), (q, k, v))

    run = compiled(branching)
    q, k, v = tensors()
    for sign in (1, -1):
        torch.testing.assert_close(run(sign * q.abs(), k, v), branching(sign * q.abs(), k, v))
    assert [site.verdict for site in reports()[-1].sites] == ["rewritten", "rewritten"]


def test_two_branches_that_share_a_shape_keep_their_own_meaning() -> None:
    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.mT).masked_fill(torch.ones(6, 6).triu(1).bool(), float("-inf")).softmax(-1) @ v

    def branching(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.cond(q.sum() > 0, attend, causal, (q, k, v))

    run = compiled(branching)
    q, k, v = tensors()
    for sign in (1, -1):
        torch.testing.assert_close(run(sign * q.abs(), k, v), branching(sign * q.abs(), k, v))


def test_a_size_that_depends_on_data_is_read_or_refused() -> None:
    def picked(x: Tensor, keep: Tensor) -> Tensor:
        tokens = x[keep]
        return attend(tokens, tokens, tokens)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        x, keep = torch.randn(9, 8, dtype=torch.float64), torch.arange(9) % 3 > 0
        torch.testing.assert_close(compiled(picked)(x, keep), picked(x, keep))
    (site,) = reports()[-1].sites
    assert site.verdict == "refused"
    assert site.reason.startswith(
        "a size depends on data, or is marked as unbacked, and the kernel has to know"
    )


def test_a_graph_without_example_values_falls_back() -> None:
    module = aten_graph(attend, *tensors())
    before = str(module.graph)
    for node in module.graph.nodes:
        node.meta.pop("val", None)
    with pytest.warns(RuntimeWarning, match="have no example values"):
        run = attnopt(module, list(held := tensors()), options={"inner": "eager"})
    assert str(module.graph) == before
    torch.testing.assert_close(run(*held), attend(*held))


def nested(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(checkpoint(attend, q, k, v, use_reentrant=False), k, v)


def test_attention_inside_and_outside_a_checkpoint_is_rewritten() -> None:
    report = check_like_eager(nested, tensors(torch.float32), differentiable=3, inner="aot_eager")
    assert [site.verdict for site in report.sites] == ["rewritten", "rewritten"]


def test_a_failure_puts_back_the_graphs_inside_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    (module,) = dynamo_graphs(nested, *tensors())
    before = [str(m.graph) for m in module.modules() if hasattr(m, "graph")]
    read, calls = SoftmaxRule.read, []

    def fails_at_the_second(self: SoftmaxRule, anchor: object, shadow: object) -> object:
        calls.append(anchor)
        if len(calls) > 1:
            message = "planted"
            raise LookupError(message)
        return read(self, anchor, shadow)

    monkeypatch.setattr(SoftmaxRule, "read", fails_at_the_second)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        report, edits = rewrite_graph(module, Options(), gradient=True)
    assert [str(m.graph) for m in module.modules() if hasattr(m, "graph")] == before
    assert (len(heard), len(report.warnings), edits) == (1, 1, ())


def test_a_rule_that_rejects_late_refuses_its_site_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(attend(q, k, v), k, v)

    from attnopt import pipeline

    describe, calls = pipeline.describe, []

    def late(site: object, *, gradient: bool) -> object:
        calls.append(site)
        if len(calls) == 1:
            message = "planted"
            raise Reject(message)
        return describe(site, gradient=gradient)

    monkeypatch.setattr(pipeline, "describe", late)
    report = check_like_eager(two, tensors())
    assert [(s.verdict, s.reason) for s in report.sites] == [("refused", "planted"), ("rewritten", "")]


def test_environment_variables_are_options_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNOPT_DENY", "sdpa,streaming")
    report = check_like_eager(attend, tensors())
    assert [(s.verdict, s.kernel) for s in report.sites] == [("refused", None)]
