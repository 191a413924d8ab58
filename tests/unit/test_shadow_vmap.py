"""What runs under torch.vmap is read through, and nothing is put into it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiling import check_like_eager, compiled
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnopt

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

#: Which argument each of the nested maps runs over: keys, queries, heads, batch.
ONE_BY_ONE = [(None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)]
#: Inputs (B, H, S, D), and which keys are no padding (B, S).
Q, K, V = (torch.randn(2, 3, 7, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
KEPT = torch.arange(7).expand(2, 7) < torch.tensor([[7], [5]])
MODES = pytest.mark.parametrize(("differentiable", "dynamic"), [(0, False), (3, False), (0, True), (3, True)])


def causal(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    del b, h
    return j <= i


def mask_of(predicate: Predicate, q: Tensor, k: Tensor) -> Tensor:
    """Bool (B, 1, Sq, Sk): a condition on one pair of positions, over all of them."""
    for dims in ONE_BY_ONE:
        predicate = torch.vmap(predicate, in_dims=dims)
    return predicate(*(torch.arange(n) for n in (q.shape[0], 1, q.shape[2], k.shape[2])))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = (q @ k.transpose(-1, -2) * 0.25).masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def by_pairs(predicate: Predicate) -> Callable[..., Tensor]:
    return lambda q, k, v: attend(q, k, v, mask_of(predicate, q, k))


def spec_of(
    function: Callable[..., Any], *more: Tensor, differentiable: int = 0, dynamic: bool = False
) -> str:
    """The spec of the one site, which is rewritten and like eager."""
    report = check_like_eager(function, (Q, K, V, *more), differentiable=differentiable, dynamic=dynamic)
    (site,) = report.sites
    assert site.verdict == "rewritten", site.reason
    return site.spec


@MODES
@pytest.mark.parametrize(
    ("predicate", "mask"),
    [
        (causal, "causal"),
        (lambda b, h, i, j: (j <= i) & (j > i - 3), "causal & window(3)"),
        (lambda b, h, i, j: (j <= i) & (j // 3 == i // 3), "causal & chunk(3)"),
        (lambda b, h, i, j: ~(j > i), "causal"),
    ],
)
def test_masks_over_pairs_are_proven(
    predicate: Predicate, mask: str, differentiable: int, dynamic: bool
) -> None:
    spec = spec_of(by_pairs(predicate), differentiable=differentiable, dynamic=dynamic)
    assert spec.endswith(f" {mask}")


@MODES
def test_closures_over_data_stay_data(differentiable: int, dynamic: bool) -> None:
    def padded(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
        return attend(q, k, v, mask_of(lambda b, h, i, j: (j <= i) & kept[b, j], q, k))

    spec = spec_of(padded, KEPT, differentiable=differentiable, dynamic=dynamic)
    assert "causal & padding" in spec


@pytest.mark.parametrize(
    ("predicate", "mask"),
    [
        (lambda b, h, i, j: j < i + 2, "causal(1)"),
        (lambda b, h, i, j: j <= i + b, "opaque"),
        (lambda b, h, i, j: j * j <= i, "opaque"),
    ],
)
def test_near_misses_are_told_apart(predicate: Predicate, mask: str) -> None:
    assert mask in spec_of(by_pairs(predicate), differentiable=3)


@MODES
def test_attention_inside_is_refused(differentiable: int, dynamic: bool) -> None:
    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(lambda q, k, v: (q @ k.mT).softmax(-1) @ v)(q, k, v)

    def product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(torch.matmul)((q @ k.mT).softmax(-1), v)

    for function in (whole, product):
        report = check_like_eager(function, (Q, K, V), differentiable=differentiable, dynamic=dynamic)
        (site,) = report.sites
        assert site.verdict == "refused"
        assert "inside torch.vmap" in site.reason


@MODES
def test_scores_and_users_inside_leave_the_site_outside(differentiable: int, dynamic: bool) -> None:
    def scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(lambda q, k: q @ k.mT)(q, k).softmax(-1) @ v

    def users(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(lambda x: x * 2 + x.sum())(by_pairs(causal)(q, k, v))

    assert spec_of(scores, differentiable=differentiable, dynamic=dynamic).endswith(" full")
    assert spec_of(users, differentiable=differentiable, dynamic=dynamic).endswith(" causal")


def test_weights_that_a_map_uses_stay() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, torch.vmap(lambda w: w.amax(-1))(weights)

    (site,) = check_like_eager(function, (Q, K, V)).sites
    assert site.verdict == "kept"


def test_autocast_and_checkpoints_around_are_respected() -> None:
    def cast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.vmap(lambda q, k: q @ k.mT)(q, k).softmax(-1) @ v

    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(by_pairs(causal), q, k, v, use_reentrant=False)

    assert spec_of(checkpointed, differentiable=3).endswith(" causal")
    out = compiled(cast)(Q, K, V)
    assert [site.verdict for site in attnopt.reports()[-1].sites] == ["rewritten"]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), (Q @ K.mT).softmax(-1) @ V, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_programs(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return by_pairs(causal)(q, k, v)

    program = torch.export.export(Model(), (Q, K, V), strict=strict)
    rewritten, report = attnopt.rewrite(program)
    assert [site.spec for site in report.sites] == ["softmax scale=0.25 causal"]
    torch.testing.assert_close(rewritten.module()(Q, K, V), Model()(Q, K, V))


@pytest.mark.parametrize(
    ("mapped", "reason"),
    [
        (lambda x: x + torch.rand_like(x), "random numbers are drawn inside torch.vmap"),
        (torch.no_grad()(lambda x: x * 2), "gradients or autocast are switched inside torch.vmap"),
        (torch.func.grad(lambda x: (x * x).sum()), "torch.func (grad, jvp, functionalize) is used"),
    ],
)
def test_what_plain_operators_would_not_show_leaves_the_graph_alone(
    mapped: Callable[[Tensor], Tensor], reason: str
) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.vmap(mapped, randomness="different")(by_pairs(causal)(q, k, v))

    with pytest.warns(RuntimeWarning, match="left a graph untouched"):
        compiled(function)(Q, K, V)
    (message,) = attnopt.reports()[-1].warnings
    assert reason in message
    assert torch._C._functorch.get_dynamic_layer_stack_depth() == 0
