"""Loops over positions that weigh each by a number beside its decay, and features of the second degree at any size."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor
from torch.nn.functional import softplus

STATE_SPACE = tuple(
    torch.randn(*shape) for shape in ((2, 6, 3, 5), (2, 6, 3), (3,), (2, 6, 3, 4), (2, 6, 3, 4))
)


def scanned(x: Tensor, decay: Tensor, b: Tensor, c: Tensor, weigh: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The state space model as a recurrence; `weigh`: what each token of x is when it is added."""
    state, out = x.new_zeros(2, 3, 5, 4), []
    for t in range(6):
        state = state * decay[:, t].exp()[..., None, None] + weigh(x, t)[..., None] * b[:, t, :, None]
        out.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]))
    return torch.stack(out, 1)


def inside(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    dt = softplus(dt)
    return scanned(x, -a.exp() * dt, b, c, lambda x, t: x[:, t] * dt[:, t, :, None])


def made_inside(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    dt, state, out = softplus(dt), x.new_zeros(2, 3, 5, 4), []
    for t in range(6):
        kept = torch.exp(dt[:, t] * -a.exp())[..., None, None]
        state = state * kept + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        out.append(torch.einsum("bhpn,bhn->bhp", state, c[:, t]))
    return torch.stack(out, 1)


def before(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    dt = softplus(dt)
    return scanned(x * dt[..., None], -a.exp() * dt, b, c, lambda x, t: x[:, t])


def test_a_weight_of_each_position_that_is_applied_in_the_loop_is_refused_with_advice() -> None:
    report = check_like_eager(made_inside, STATE_SPACE, differentiable=5)
    assert [site.verdict for site in report.sites] == ["refused"]
    assert "multiply the keys or the values by it before the loop" in report.sites[0].reason


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_advice_leads_to_a_rewrite(*, dynamic: bool) -> None:
    report = check_like_eager(before, STATE_SPACE, differentiable=5, dynamic=dynamic)
    assert [(s.verdict, s.spec) for s in report.sites] == [
        ("rewritten", "linear scale=1 causal decay per token")
    ]


def test_a_weight_beside_a_decay_made_before_the_loop_is_right() -> None:
    check_like_eager(inside, STATE_SPACE, differentiable=5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_features_of_the_second_degree_are_no_outer_product_of_keys_and_values(*, dynamic: bool) -> None:
    """1, x and x x^T as features, as Taylor's series of exp has them (Arora et al. 2024, arXiv:2402.18668)."""

    def features(x: Tensor) -> Tensor:
        second = (x[..., :, None] * x[..., None, :]).flatten(-2) / 2**0.5
        return torch.cat([torch.ones_like(x[..., :1]), x, second], -1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = features(q)[..., None, :], features(k)[..., None, :], v[..., None]
        return (q * (k * v).cumsum(2)).sum(-1) / ((q * k.cumsum(2)).sum(-1) + 1e-6)

    report = check_like_eager(
        attend, [x.abs() for x in torch.randn(3, 2, 3, 8, 4).unbind()], differentiable=3, dynamic=dynamic
    )
    assert [(s.verdict, s.spec) for s in report.sites] == [("rewritten", "linear scale=1 causal")]
