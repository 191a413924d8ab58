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
