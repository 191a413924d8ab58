"""Mutants that were once computed wrong, or stopped the compiler: each is refused now, or computed right.

They are written out, since a seed makes another mutant as soon as a program or an operator is added.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from mutant_trials import Setting, judged
from torch import Tensor

B, H, S, D = 2, 3, 7, 4


def heads(*more: Any) -> tuple[Any, ...]:
    """Queries, keys and values in fp64."""
    torch.manual_seed(0)
    return (*torch.randn(3, B, H, S, D, dtype=torch.float64).unbind(), *more)


@dataclass(frozen=True)
class Case:
    """attend: the mutant. more: what it takes beside q, k and v."""

    attend: Callable[..., Any]
    more: tuple[Any, ...] = ()
    training: bool = True
    kernels: tuple[str, ...] = field(default=())


CASES: list[Case] = []


def was_wrong(*more: Any, training: bool = True, kernels: tuple[str, ...] = ()) -> Callable[..., Any]:
    """Adds the function to CASES."""

    def add(attend: Callable[..., Any]) -> Callable[..., Any]:
        CASES.append(Case(attend, more, training, kernels))
        return attend

    return add


KEEP = torch.ones(B, S, dtype=torch.bool)
KEEP[0, :2] = False
LOWEST = torch.finfo(torch.float32).min


@was_wrong(torch.rand(H, dtype=torch.float64), training=False)
def decays_rounded_to_zero(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
    apart = torch.arange(S)[:, None] - torch.arange(S)
    decay = torch.exp2(apart * rates.long().double().log2()[:, None, None]) * (apart >= 0)
    return (q @ k.mT * decay) @ v


@was_wrong(KEEP, training=False, kernels=("streaming",))
def large_numbers_added_before_rounding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25 + (1.0 - keep[:, :1, None, None].float()) * -1e9
    return scores.float().double().softmax(-1) @ v


@was_wrong(KEEP, training=False, kernels=("streaming",))
def large_whole_numbers_added_before_rounding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.mT * 0.25 + (1 - keep[:, :1, None, None].long()) * -(10**9)
    return scores.float().double().softmax(-1) @ v


@was_wrong(-torch.rand(H, 1, 1, dtype=torch.float64), KEEP, kernels=("sdpa",))
def scores_times_a_huge_number(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, keep: Tensor) -> Tensor:
    return ((q @ k.mT * 0.25) * torch.where(keep[:, None, None], 0.0, -1e9) * scale).softmax(-1) @ v


@was_wrong(KEEP)
def scores_times_the_lowest_number(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    lowest = (1.0 - keep[:, None, None].double()) * (torch.finfo(torch.float64).min / 2)
    return ((q @ k.mT) / 4 * lowest).softmax(-1) @ v


@was_wrong(training=False)
def matrix_of_decays_after_a_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(S)
    decay = 0.97 ** (at[:, None] - at[None, :]) * torch.ones(S, S, dtype=torch.bool).tril()
    decay[decay == 0] = 0.0
    return (k @ q.mT * decay.softmax(-1)) @ v


@was_wrong(kernels=("streaming",))
def output_written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = (q @ k.mT * 0.25).softmax(-1) @ v
    out[..., 0].neg_()
    return out


@was_wrong(torch.rand(H, 1, 1, dtype=torch.float64), KEEP & (torch.arange(B) > 0)[:, None])
def number_in_single_precision_inside_a_learned_scale(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, keep: Tensor
) -> Tensor:
    return ((q @ k.mT * 0.25 + torch.where(keep[:, None, None], 0.0, -1e8)) * scale).softmax(-1) @ v


@was_wrong(torch.randn(H, S, S, dtype=torch.float64), kernels=("streaming",))
def bias_written_to_afterwards(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    own = bias * 1
    out = (q @ k.mT + own).softmax(-1) @ v
    own[:, 0] = 0.0
    return out, own


@was_wrong(KEEP)
def scores_times_a_mask_of_numbers(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    kept = keep[:, None, None].to(q.dtype)
    return (q @ k.mT * kept + (1 - kept) * -1e4).softmax(-1) @ v


@was_wrong(torch.randn(B, H, S, dtype=torch.float64))
def running_products_of_gates_of_any_sign(q: Tensor, k: Tensor, v: Tensor, raw: Tensor) -> Tensor:
    run = raw.tanh().cumprod(-1)
    return (q @ k.mT * (run[..., :, None] / run[..., None, :]).tril()) @ v


@was_wrong(torch.randn(B, H, S, dtype=torch.float64))
def running_products_of_an_input(q: Tensor, k: Tensor, v: Tensor, raw: Tensor) -> Tensor:
    run = raw.cumprod(-1)
    return (q @ k.mT * (run[..., :, None] / run[..., None, :]).tril()) @ v


@was_wrong(torch.rand(H, dtype=torch.float64), training=False)
def sums_divided_by_a_triangle(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    at = torch.arange(S)
    decay = (-rate[:, None, None] * (at[:, None] - at[None])).exp().tril()
    return (q @ k.mT * ((decay.sum(-1, keepdim=True) + decay.sum(-2, keepdim=True)) / decay)) @ v


@was_wrong(training=False)
def outputs_times_infinity(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1
    total = torch.dropout(torch.einsum("bhld,bhd->bhl", q, k.sum(2)) + 1e-6, 1.0, train=True)
    return torch.einsum("bhld,bhdv,bhl->bhlv", q, k.mT @ (v / S), 1 / total) * S


@was_wrong(torch.randn(H, dtype=torch.float64))
def sink_in_the_maximum_alone(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = q @ k.mT * 0.5
    weights = (scores - torch.maximum(scores.amax(-1, keepdim=True), sinks[:, None, None])).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


@was_wrong(training=False)
def sum_of_exponentials_cast_to_half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 6.0).exp()
    return (weights @ v) / weights.sum(-1, keepdim=True).half().double()


@was_wrong(KEEP & (torch.arange(B) > 0)[:, None], training=False, kernels=("streaming",))
def two_lowest_numbers_added_in_double(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    hidden, lowest = torch.ones(S, S, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min
    hidden[0].fill_(True)
    scores = q @ k.mT * 0.25 + torch.where(hidden, lowest, 0.0).float()
    return (scores + torch.where(keep[:, None, None], 0.0, lowest).float()).softmax(-1) @ v


@was_wrong(KEEP.clone(), training=False, kernels=("streaming",))
def padding_written_to_after_two_lowest_numbers(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    shown, lowest = keep[:, None], torch.finfo(torch.float32).min
    scores = q @ k.mT * 0.25 + torch.where(torch.ones(S, S, dtype=torch.bool).triu(1), lowest, 0.0)
    out = (scores + torch.where(shown[:, None], 0.0, lowest)).softmax(-1) @ v
    shown.logical_not_()
    return out


@was_wrong(torch.rand(H, dtype=torch.float64), kernels=("lightning",))
def decays_cast_to_whole_numbers(q: Tensor, k: Tensor, v: Tensor, base: Tensor) -> Tensor:
    log_decay, at = base.long().double().log()[:, None, None], torch.arange(S)
    return (q @ k.mT * (log_decay * (at[:, None] - at[None]).abs()).exp()).tril() @ v


@was_wrong(kernels=("streaming",))
def one_query_under_a_causal_mask_of_many(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lowest = torch.full((S, S), torch.finfo(torch.float64).min, dtype=torch.float64)
    return (q[:, :, :1] @ k.mT / 4 + lowest.triu(1)).softmax(-1) @ v


@was_wrong()
def scores_times_a_negative_power_of_0(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * (torch.zeros(S, 1, dtype=q.dtype) ** (torch.arange(S)[:, None] - S + 1))) @ v


@was_wrong(torch.rand(H, dtype=torch.float64), training=False)
def scores_divided_by_a_rate_times_0(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    at = torch.arange(S)[:, None]
    return (q @ k.mT * (1.0 / (-rate[:, None, None] * (at - at)))) @ v


@was_wrong(training=False, kernels=("sdpa",))
def scores_divided_by_distances_from_the_last_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    slope = 2.0 ** -torch.arange(1, H + 1)[:, None, None]
    return (q @ k.mT / (slope * (torch.arange(S, dtype=q.dtype) - S + 1))).softmax(-1) @ v


@was_wrong(torch.rand(H, dtype=torch.float64), torch.rand(B, H, S, dtype=torch.float64), training=False)
def log_decays_cast_to_whole_numbers(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, steps: Tensor) -> Tensor:
    run = 9 * steps.cumsum(-1)
    exponent = -rate[:, None, None] * (run[..., :, None] - run[..., None, :])
    return (q @ k.mT * exponent.tril().long().double().exp().tril()) @ v


@was_wrong()
def exp_of_infinity_where_keys_were_hidden(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT + torch.full((S, S), -torch.inf, dtype=q.dtype).triu(1)
    weights = (-(scores - scores.amax(-1, keepdim=True))).exp()
    return (weights * weights.sum(-1, keepdim=True).reciprocal()) @ v


@was_wrong(training=False, kernels=("sdpa",))
def running_sum_of_the_lowest_number(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    lowest = torch.full((S, S), torch.finfo(torch.float64).min, dtype=torch.float64)
    return (((q @ k.mT).bfloat16().double() + lowest.cumsum(-1).triu(1)) / 2).softmax(-1) @ v


@was_wrong(torch.rand(B, S, dtype=torch.float64).round())
def weights_over_data_repeated_along_the_keys(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) / rows[:, None, :, None].repeat(1, H, 1, S)) @ v


@was_wrong(KEEP)
def weights_over_a_mask_of_keys(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    keep = keep[:, None, None].clone()
    return ((q @ k.mT).masked_fill(~keep, -torch.inf).softmax(-1) / keep) @ v


@was_wrong(KEEP)
def largest_double_filled_in_before_a_cast(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(~keep[:, None, None], torch.finfo(torch.float64).max)
    return scores.float().softmax(-1).double() @ v


@was_wrong(KEEP)
def lowest_floats_doubled_in_doubles(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    later = torch.ones(S, S, dtype=torch.bool).triu(1)
    scores = q @ k.mT + torch.where(later, LOWEST, 0.0) + torch.where(keep[:, None, None], 0.0, LOWEST)
    return scores.mul_(2.0).softmax(-1) @ v


@was_wrong(KEEP)
def lowest_floats_turned_around_through_a_view(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    later = torch.where(torch.ones(S, S, dtype=torch.bool).triu(1), LOWEST, 0.0)
    later.unsqueeze(0).neg_()
    return (q @ k.mT + later + torch.where(keep[:, None, None], 0.0, LOWEST)).softmax(-1) @ v


@was_wrong(torch.rand(H, dtype=torch.float64), training=False, kernels=("lightning",))
def decays_dropped_out(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    places = torch.arange(S)
    rate = torch.nn.functional.dropout(gamma, 1.0).log()[:, None, None]
    return (q @ k.mT * (rate * (places[:, None] - places).abs()).exp()).tril() @ v


@was_wrong()
def block_written_to_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    out = scores.softmax(-1) @ v
    scores[:, :, 1:, 1:] += 1.0
    return out


def token_loop(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    state, out = torch.zeros(B, H, D, D, dtype=q.dtype), []
    for n in range(S):
        state = gate[:, :, n, None, None] * state + k[:, :, n, :, None] * v[:, :, n, None, :]
        out.append((q[:, :, n, None, :] @ state)[:, :, 0])
    return torch.stack(out, 2)


CASES.append(Case(token_loop, (torch.randn(B, H, S, dtype=torch.float64),)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.attend.__name__)
def test_it_is_left_alone_or_computed_right(case: Case) -> None:
    found = judged(case.attend, heads(*case.more), Setting(training=case.training, kernels=case.kernels))
    assert found.wrong == "", found.verdicts
