"""Recurrences that forget feature by feature, unrolled: named as that, not as delta rules, and left as they are."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

B, H, S, D, E = 2, 3, 6, 4, 5

BY_FEATURE, DELTA = "forgets each feature by its own gate", "a delta rule"


def start(q: Tensor) -> Tensor:
    return torch.zeros(B, H, D, E, dtype=q.dtype)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def gates_that_are_the_keys(q: Tensor, v: Tensor, raw: Tensor) -> Tensor:
    """HGRN2 (Qin et al. 2024, arXiv:2404.07904): k = 1 - f."""
    state, rows, kept = start(q), [], raw.sigmoid()
    for t in range(S):
        state = kept[:, :, t, :, None] * state + outer(1 - kept[:, :, t], v[:, :, t])
        rows.append((q[:, :, t, :, None] * state).sum(-2))
    return torch.stack(rows, 2)


def a_bonus_and_a_rate_for_each_feature(r: Tensor, k: Tensor, v: Tensor, rate: Tensor, own: Tensor) -> Tensor:
    """RWKV-5 (Peng et al. 2024, arXiv:2404.05892, eq. 13 and 14)."""
    state, rows, kept = start(r), [], (-rate.exp()).exp()[..., None]
    for t in range(S):
        new = outer(k[:, :, t], v[:, :, t])
        rows.append(torch.einsum("bhi,bhij->bhj", r[:, :, t], state + own[..., None] * new))
        state = new + kept * state
    return torch.stack(rows, 2)


def a_bonus_and_gates_by_token(r: Tensor, k: Tensor, v: Tensor, gate: Tensor, own: Tensor) -> Tensor:
    """RWKV-6: the rates are data."""
    state, rows = start(r), []
    for t in range(S):
        new = outer(k[:, :, t], v[:, :, t])
        rows.append(torch.einsum("bhi,bhij->bhj", r[:, :, t], state + own[..., None] * new))
        state = new + (-gate[:, :, t].exp()).exp()[..., None] * state
    return torch.stack(rows, 2)


def a_rule_that_corrects(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Yang et al. 2024, arXiv:2406.06484: what the state knows of the key is taken away first."""
    state, rows = start(q), []
    for t in range(S):
        known = (state * k[:, :, t, :, None]).sum(-2)
        state = state + outer(k[:, :, t], v[:, :, t] - 0.5 * known)
        rows.append((state * q[:, :, t, :, None]).sum(-2))
    return torch.stack(rows, 2)


def of(*widths: int) -> list[Tensor]:
    return [torch.randn(B, H, S, n) * 0.5 for n in widths]


CASES = [
    (gates_that_are_the_keys, lambda: of(D, E, D), BY_FEATURE),
    (a_bonus_and_a_rate_for_each_feature, lambda: [*of(D, D, E), *torch.randn(2, H, D)], BY_FEATURE),
    (a_bonus_and_gates_by_token, lambda: [*of(D, D, E, D), torch.randn(H, D)], BY_FEATURE),
    (a_rule_that_corrects, lambda: of(D, D, E), DELTA),
]


@pytest.mark.parametrize(("attend", "given", "reason"), CASES, ids=[case[0].__name__ for case in CASES])
def test_it_is_named(attend: Callable[..., Tensor], given: Callable[[], list[Tensor]], reason: str) -> None:
    inputs = given()
    report = check_like_eager(attend, inputs, differentiable=len(inputs))
    found = [site for site in report.sites if site.family == "linear"]
    assert [(site.verdict, reason in site.reason) for site in found] == [("refused", True)]
    assert all("test_linear_loop_named.py:" in site.where for site in found)
