"""Linear attention in training, under autocast, with checkpoints, in half precision, and in exported programs."""

import pytest
import torch
from compiling import check_like_eager, compiled, reports_after
from linear_gated_spellings import differences, future, segment_sums
from linear_spellings import scores
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import attnopt

WIDTH, HEADS = 32, 4


class Gated(nn.Module):
    """A layer of linear attention with a gate per token (Dao and Gu 2024, arXiv:2405.21060), and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH + HEADS)
        self.rate = nn.Parameter(torch.linspace(-1.0, 1.0, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        *qkv, steps = self.project(x).split([WIDTH] * 3 + [HEADS], -1)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in qkv)
        decay = segment_sums((functional.softplus(steps) * -self.rate.exp()).transpose(1, 2)).exp()
        out = (scores(q, k) * decay.to(q.dtype) * 0.25) @ v
        return x + out.transpose(1, 2).flatten(2)


class Stack(nn.Module):
    """Two such layers; each may be computed again in the backward pass."""

    def __init__(self, *, again: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Gated() for _ in range(2))
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.again else layer(x)
        return x


def stack(*, again: bool = False) -> Stack:
    torch.manual_seed(0)
    return Stack(again=again)


def gradients(function: nn.Module, model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    function(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_weights_and_gates_learn_as_in_eager(again: bool, dynamic: bool) -> None:
    model, x = stack(again=again).double(), torch.randn(2, 21, WIDTH, dtype=torch.float64)
    want, before = gradients(model, model, x), attnopt.reports()
    got = gradients(compiled(model, dynamic=dynamic, inner="aot_eager"), model, x)
    torch.testing.assert_close(got, want)
    assert [site.verdict for site in reports_after(before).attention] == ["rewritten"] * 2
    assert all(float(g.abs().max()) > 0 for name, g in want.items() if "rate" in name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_its_dtypes_and_is_as_good_as_eager(dtype: torch.dtype) -> None:
    model, x = stack(), torch.randn(2, 21, WIDTH)

    def lowered(given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            return model(given)

    exact, eager, before = model(x), lowered(x), attnopt.reports()
    got = compiled(lowered)(x)
    assert got.dtype == eager.dtype
    assert [site.verdict for site in reports_after(before).attention] == ["rewritten"] * 2
    assert float((got - exact).norm().detach()) <= 1.5 * float((eager - exact).norm().detach())


def test_a_model_in_bfloat16_is_as_good_as_eager() -> None:
    x = torch.randn(2, 21, WIDTH)
    exact, model, before = stack()(x), stack().bfloat16(), attnopt.reports()
    got = compiled(model)(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert [site.verdict for site in reports_after(before).attention] == ["rewritten"] * 2
    eager = model(x.bfloat16())
    assert float((got - exact).norm().detach()) <= 1.5 * float((eager - exact).norm().detach())


def test_an_exported_program_with_gates_is_read() -> None:
    model, x = stack().double().eval(), torch.randn(2, 21, WIDTH, dtype=torch.float64)
    program, report = attnopt.rewrite(torch.export.export(model, (x,)))
    assert [site.verdict for site in report.attention] == ["rewritten"] * 2
    torch.testing.assert_close(program.module()(x), model(x))


def retention(q: Tensor, k: Tensor, v: Tensor, steps: Tensor) -> Tensor:
    weights = scores(q, k) * differences(steps.cumsum(-1)).masked_fill(future(q), -torch.inf).exp()
    return (weights / weights.detach().sum(-1, keepdim=True).abs().clamp(min=1)) @ v


def test_a_detached_normaliser_lets_no_gradient_through() -> None:
    torch.manual_seed(0)
    held = [torch.randn(2, 3, 9, n, dtype=torch.float64) for n in (4, 4, 5)]
    report = check_like_eager(
        retention, [*held, -torch.rand(2, 3, 9).double()], differentiable=4, inner="aot_eager"
    )
    (site,) = report.attention
    assert (site.verdict, "detached" in site.spec) == ("rewritten", True)


class Masked(nn.Module):
    """A triangle of ones that the module holds, longer than any sequence."""

    triangle: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("triangle", torch.ones(32, 32).tril())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (scores(q, k) * self.triangle[: q.shape[2], : q.shape[2]].to(q.dtype)) @ v


def test_a_triangle_in_a_buffer_is_believed_as_long_as_it_stays() -> None:
    model, (q, k, v) = Masked(), (torch.randn(2, 3, 9, n) for n in (4, 4, 5))
    before, function = attnopt.reports(), compiled(model)
    torch.testing.assert_close(function(q, k, v), model(q, k, v))
    assert [site.spec for site in reports_after(before).attention] == ["linear scale=1 causal"]
    model.triangle.fill_(0.5)
    with pytest.warns(RuntimeWarning, match="has changed"):
        changed = function(q, k, v)
    torch.testing.assert_close(changed, model(q, k, v))


@pytest.mark.parametrize("length", [2, 63, 64, 65, 200])
def test_lengths_around_the_chunk_are_served(length: int) -> None:
    torch.manual_seed(length)
    q, k, v = (torch.rand(1, 2, length, n) for n in (4, 4, 5))
    report = check_like_eager(retention, (q, k, v, -torch.rand(1, 2, length)), differentiable=4)
    assert [site.verdict for site in report.attention if site.family == "linear"] == ["rewritten"]
