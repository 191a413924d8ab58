"""Recurrences whose state is multiplied by more than a number: named, with the user's line, and left as they are."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from linear_spellings import DV, D, H, NearMiss, scores
from torch import Tensor, nn
from torch.nn import functional

STEPS = 6
UNSERVED: list[NearMiss] = []


def unserved(reason: str, inputs: Callable[[], tuple[Tensor, ...]]) -> Callable[..., Callable[..., Tensor]]:
    """Registers a function that is refused for `reason`."""

    def register(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        UNSERVED.append(NearMiss(attend, reason, inputs))
        return attend

    return register


DELTA = "a delta rule: the state is multiplied by a matrix"
VECTOR = "the state is multiplied by a vector"


def with_rates() -> tuple[Tensor, ...]:
    """q, k, v of few tokens, and how much each is learned, (B, H, S)."""
    widths = (D, D, DV)
    q, k, v = (torch.randn(2, H, STEPS, n) for n in widths)
    return q, functional.normalize(k, dim=-1), v, torch.rand(2, H, STEPS)


@unserved(DELTA, with_rates)  # fla-org/flash-linear-attention, ops/delta_rule/naive.py, one chunk
def forward_substitution(q, k, v, rate):
    slow, ones = k * rate[..., None], torch.ones(STEPS, STEPS, dtype=torch.bool)
    rows = -(slow @ k.mT).masked_fill(ones.triu(), 0)
    for i in range(1, STEPS):
        row, above = rows[..., i, :i].clone(), rows[..., :i, :i].clone()
        rows[..., i, :i] = row + (row[..., None] * above).sum(-2)
    rows = rows + torch.eye(STEPS, dtype=rows.dtype)
    new = rows @ (v * rate[..., None])
    return torch.tanh(scores(q, k)).masked_fill(ones.triu(1), 0) @ new.tanh()


@unserved(DELTA, with_rates)  # transformers, models/qwen3_next/modeling_qwen3_next.py
def triangle_solved(q, k, v, rate):
    slow = k * rate[..., None]
    matrix, solve = slow @ k.mT, torch.linalg.solve_triangular
    new, seen = (solve(matrix, x, upper=False, unitriangular=True) for x in (v * rate[..., None], slow))
    return torch.tanh(scores(q, k)).tril() @ new, seen


def of_channels() -> tuple[Tensor, ...]:
    """k, v (B, S, D), and numbers for each channel."""
    return torch.randn(2, STEPS, D), torch.randn(2, STEPS, D), torch.rand(D), torch.rand(D)


@unserved(VECTOR, of_channels)  # transformers, models/rwkv/modeling_rwkv.py
def running_mean_of_each_channel(k, v, decay, first):
    above, below, most = (
        torch.zeros_like(k[:, 0]),
        torch.zeros_like(k[:, 0]),
        torch.zeros_like(k[:, 0]) - 1e38,
    )
    out = torch.zeros_like(k)
    for t in range(STEPS):
        key, value = k[:, t], v[:, t]
        peak = torch.maximum(most, key + first)
        old, new = torch.exp(most - peak), torch.exp(key + first - peak)
        out[:, t] = (old * above + new * value) / (old * below + new)
        peak = torch.maximum(most - decay, key)
        old, new = torch.exp(most - decay - peak), torch.exp(key - peak)
        above, below, most = old * above + new * value, old * below + new, peak
    return out


EXPONENTIAL = "exponential gates with a running maximum"


def with_exponents() -> tuple[Tensor, ...]:
    """q, k, v of few tokens, and the exponents of the gates, (B, H, S)."""
    q, k, v = (torch.randn(2, H, STEPS, n) for n in (D, D, DV))
    return q, k, v, torch.randn(2, H, STEPS), torch.randn(2, H, STEPS)


def exponents(start: Tensor, forget: Tensor) -> Tensor:
    run = functional.logsigmoid(forget).cumsum(-1)
    future = torch.ones(STEPS, STEPS, dtype=torch.bool).triu(1)
    return (run[..., :, None] - run[..., None, :] + start[..., None, :]).masked_fill(future, -torch.inf)


@unserved(EXPONENTIAL, with_exponents)  # Beck et al. 2024, arXiv:2405.04517, eq. 75 to 81
def stabilised_weights(q, k, v, start, forget):
    powers = exponents(start, forget)
    most = powers.amax(-1, keepdim=True)
    weights = scores(q, k) * (powers - most).exp()
    return weights / (torch.maximum(weights.sum(-1, keepdim=True).abs(), (-most).exp()) + 1e-6) @ v


@unserved(EXPONENTIAL, with_exponents)  # transformers, models/xlstm/modeling_xlstm.py, by tokens
def stabilised_steps(q, k, v, start, forget):
    state, sums = q.new_zeros(2, H, D, DV), q.new_zeros(2, H, D)
    most, out = q.new_zeros(2, H), []
    for t in range(STEPS):
        kept = functional.logsigmoid(forget[:, :, t]) + most
        top = torch.maximum(kept, start[:, :, t])
        old, new = (kept - top).exp()[..., None], (start[:, :, t] - top).exp()[..., None]
        state = old[..., None] * state + (new * k[:, :, t])[..., None] * v[:, :, t, None]
        sums, most = old * sums + new * k[:, :, t], top
        total = (q[:, :, t] * sums).sum(-1, keepdim=True).abs()
        above = (q[:, :, t, None] @ state).squeeze(-2)
        out.append(above / (torch.maximum(total, (-most).exp()[..., None]) + 1e-6))
    return torch.stack(out, 2)


def buckets() -> tuple[Tensor, ...]:
    """q, k, v whose length is a multiple of 4."""
    return tuple(torch.randn(2, H, 16, D) for _ in range(3))


# lucidrains/linear-attention-transformer, linear_attention_transformer.py: each bucket sees those before it
@unserved("running sums of keys times values, which also takes clamp", buckets)
def buckets_before(q, k, v):
    q, k, v = (x.unflatten(2, (-1, 4)) for x in (q.softmax(-1), k.exp(), v))
    states = torch.einsum("bhund,bhune->bhude", k, v).cumsum(2)
    sums = k.sum(-2).cumsum(-2)
    states = functional.pad(states, (0, 0, 0, 0, 1, 0))[:, :, :-1]
    sums = functional.pad(sums, (0, 0, 1, 0))[:, :, :-1]
    inverse = 1 / torch.einsum("bhud,bhund->bhun", sums, q).clamp(min=1e-3)
    return torch.einsum("bhund,bhude,bhun->bhune", q, states, inverse).flatten(2, 3)


def test_a_bound_that_does_not_move_is_no_running_maximum() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, start: Tensor, forget: Tensor) -> Tensor:
        weights = scores(q, k).tril()
        least = (-start[..., None]).exp()  # data, but the largest of nothing
        return weights / torch.maximum(weights.sum(-1, keepdim=True).abs(), least) @ v

    report = check_like_eager(attend, with_exponents())
    assert report.having("rewritten") == ()
    assert not any(EXPONENTIAL in site.reason for site in report.sites)


@pytest.mark.parametrize("case", UNSERVED, ids=lambda case: case.name)
def test_it_has_one_entry_with_the_reason_and_the_line(case: NearMiss) -> None:
    report = check_like_eager(case.attend, case.inputs())
    (site,) = (site for site in report.sites if site.family == "linear")
    assert (site.verdict, case.reason in site.reason) == ("refused", True), site.reason
    assert "test_linear_unserved.py:" in site.where


class Cell(nn.Module):
    """An LSTM cell, unrolled: gates for each channel, and no attention."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2 * D, 4 * D)

    def forward(self, x: Tensor) -> Tensor:
        hidden = kept = torch.zeros_like(x[:, 0])
        out = []
        for t in range(STEPS):
            start, forget, new, end = self.inner(torch.cat([x[:, t], hidden], -1)).chunk(4, -1)
            kept = forget.sigmoid() * kept + start.sigmoid() * new.tanh()
            hidden = end.sigmoid() * kept.tanh()
            out.append(hidden)
        return torch.stack(out, 1)


def weighted_mean(x: Tensor, weights: Tensor) -> Tensor:
    return (x * weights + x.flip(1) * 2) / (weights + 2)


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    matrix = torch.eye(STEPS, dtype=x.dtype) + x.tril(-1)
    return torch.linalg.solve_triangular(matrix, y, upper=False)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (Cell().double(), [torch.randn(2, STEPS, D).double()]),
        (weighted_mean, [torch.rand(2, STEPS, D), torch.rand(2, STEPS, D)]),
        (least_squares, [torch.rand(2, STEPS, STEPS), torch.rand(2, STEPS, D)]),
    ],
    ids=["long short-term memory", "one weighted mean", "a solve without products"],
)
def test_what_is_no_attention_has_no_entry(function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    report = check_like_eager(function, inputs)
    assert [site.reason for site in report.sites if site.family == "linear"] == []
