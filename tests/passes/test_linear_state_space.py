"""State spaces in chunks (state-spaces/mamba, modules/ssd_minimal.py) with their last state, and with free lengths."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor
from torch.nn import functional

B, S, H, G, N, P, BLOCK = 2, 24, 4, 2, 8, 12, 8


def segments(x: Tensor) -> Tensor:
    n = x.shape[-1]
    ones = torch.ones(n, n, dtype=torch.bool)
    sums = x[..., None].expand(*x.shape, n).masked_fill(~ones.tril(-1), 0).cumsum(-2)
    return sums.masked_fill(~ones.tril(), -torch.inf)


def chunked(x: Tensor, a: Tensor, b: Tensor, c: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The outputs (B, S, H, P) and the last state, which is a part of all states."""
    x, a, b, c = (t.reshape(t.shape[0], -1, BLOCK, *t.shape[2:]) for t in (x, a, b, c))
    a = a.permute(0, 3, 1, 2)
    run = a.cumsum(-1)
    inner = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", c, b, segments(a).exp(), x)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", b, (run[..., -1:] - run).exp(), x)
    states = torch.cat([torch.zeros_like(states[:, :1]) if first is None else first, states], 1)
    between = segments(functional.pad(run[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", between, states)
    outer = torch.einsum("bclhn,bchpn,bhcl->bclhp", c, states[:, :-1], run.exp())
    return (inner + outer).reshape(x.shape[0], -1, H, P), states[:, -1]


def grouped(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, rate: Tensor, skip: Tensor) -> Tensor:
    """As the module calls it: steps by softplus, fewer groups than heads, a way past all of it."""
    b, c = (t.unflatten(-1, (G, N)).repeat_interleave(H // G, 2) for t in (b, c))
    x, dt = x.unflatten(-1, (H, P)), functional.softplus(dt)
    return (chunked(x * dt[..., None], -rate.exp() * dt, b, c)[0] + x * skip[:, None]).flatten(2)


def inputs() -> list[Tensor]:
    b, c = torch.randn(2, B, S, H, N)
    return [torch.randn(B, S, H, P), -torch.rand(B, S, H), b, c]


@pytest.mark.parametrize("first", [[], [torch.randn(B, 1, H, P, N)]], ids=["from nothing", "from a state"])
def test_a_last_state_that_is_part_of_all_is_laid_out_as_one(first: list[Tensor]) -> None:
    given = [*inputs(), *first]
    report = check_like_eager(chunked, given, differentiable=len(given), inner="aot_eager")
    (site,) = report.attention
    states = " initial state final state" if first else " final state"
    assert (site.verdict, site.spec) == ("rewritten", f"linear scale=1 causal decay per token{states}")


def test_lengths_may_be_symbolic() -> None:
    report = check_like_eager(lambda *given: chunked(*given)[0], inputs(), differentiable=4, dynamic=True)
    (site,) = report.attention
    assert (site.verdict, site.spec) == ("rewritten", "linear scale=1 causal decay per token"), site.reason


@pytest.mark.parametrize("dynamic", [False, True])
def test_steps_and_groups_of_the_module(dynamic: bool) -> None:
    given = [torch.randn(B, S, n) for n in (H * P, H, G * N, G * N)]
    given += [torch.rand(H), torch.randn(H)]
    report = check_like_eager(grouped, given, differentiable=6, dynamic=dynamic)
    (site,) = report.attention
    assert (site.verdict, site.spec) == ("rewritten", "linear scale=1 causal decay per token"), site.reason
