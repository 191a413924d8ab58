"""Functions that look like gated linear attention, one detail changed: refused for the reason that stands beside."""

import math
from collections.abc import Callable

import torch
from linear_gated_spellings import differences, future, state_space
from linear_spellings import D, NearMiss, S, causal, decay_of, distance, gated, plain, scores
from torch import Tensor
from torch.nn import functional

UNPROVEN = "not proven to be a mask or a decay"
NEAR: list[NearMiss] = []


def near_miss(
    reason: str, inputs: Callable[[], tuple[Tensor, ...]] = gated
) -> Callable[..., Callable[..., Tensor]]:
    """Registers a function as a near miss that is refused for `reason`, or passed over in silence."""

    def register(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        NEAR.append(NearMiss(attend, reason, inputs))
        return attend

    return register


def hidden(exponent: Tensor, q: Tensor) -> Tensor:
    return exponent.masked_fill(future(q), -math.inf).exp()


@near_miss(UNPROVEN)
def own_gate_counts_too(q, k, v, steps):
    run = steps.cumsum(-1)
    return (scores(q, k) * hidden(run[..., :, None] - (run - steps)[..., None, :], q)) @ v


@near_miss(UNPROVEN)
def own_gate_does_not_count(q, k, v, steps):
    run = steps.cumsum(-1)
    return (scores(q, k) * hidden((run - steps)[..., :, None] - run[..., None, :], q)) @ v


@near_miss(UNPROVEN)
def sums_of_running_sums(q, k, v, steps):
    run = steps.cumsum(-1)
    return (scores(q, k) * hidden(run[..., :, None] + run[..., None, :], q)) @ v


@near_miss(UNPROVEN)
def doubled_for_keys_alone(q, k, v, steps):
    run = steps.cumsum(-1)
    return (scores(q, k) * hidden(run[..., :, None] - 2 * run[..., None, :], q)) @ v


@near_miss(UNPROVEN)
def length_of_the_difference(q, k, v, steps):
    return (scores(q, k) * torch.exp(-differences(steps.cumsum(-1)).abs())) @ v


@near_miss("not the diagonal")
def gates_one_key_too_far(q, k, v, steps):
    return (scores(q, k) * differences(steps.cumsum(-1)).exp()).tril(1) @ v


@near_miss("not the diagonal")
def gates_without_the_diagonal(q, k, v, steps):
    return (scores(q, k) * differences(steps.cumsum(-1)).exp()).tril(-1) @ v


@near_miss("mask")
def gates_over_the_future(q, k, v, steps):
    return (scores(q, k) * differences(-steps.cumsum(-1)).exp()).triu() @ v


@near_miss("without causal order")
def gates_without_a_triangle(q, k, v, steps):
    return (scores(q, k) * differences(steps.cumsum(-1)).exp()) @ v


@near_miss(UNPROVEN, state_space)
def segments_that_count_their_first_gate(c, b, x, raw):
    steps = -functional.softplus(raw).transpose(1, 2)
    inside = torch.ones(S, S, dtype=torch.bool).tril()
    sums = steps[..., None].expand(*steps.shape, S).masked_fill(~inside, 0).cumsum(-2)
    decay = sums.masked_fill(~inside, -math.inf).exp()
    return torch.einsum("blhn,bshn,bhls,bshp->blhp", c, b, decay, x)


@near_miss(UNPROVEN, state_space)
def segments_along_the_keys(c, b, x, raw):
    steps = -functional.softplus(raw).transpose(1, 2)
    before = torch.ones(S, S, dtype=torch.bool).tril(-1)
    sums = steps[..., None].expand(*steps.shape, S).masked_fill(~before, 0).cumsum(-1)
    decay = sums.masked_fill(~causal(steps[:, :, :, None]), -math.inf).exp()
    return torch.einsum("blhn,bshn,bhls,bshp->blhp", c, b, decay, x)


@near_miss("a gate for each feature: the state is multiplied by a vector")
def a_gate_for_each_feature(q, k, v, steps):
    run = (k.sigmoid().log() * steps[..., None].exp()).cumsum(-2)
    decay = (run[..., :, None, :] - run[..., None, :, :]).masked_fill(future(q)[..., None], -math.inf).exp()
    return torch.einsum("bhid,bhjd,bhijd,bhje->bhie", q, k, decay, v)


@near_miss(UNPROVEN)
def an_input_gate_in_the_exponent(q, k, v, steps):  # Beck et al. 2024, arXiv:2405.04517, eq. 21
    run = steps.cumsum(-1)
    return (scores(q, k) * hidden(differences(run) + steps[..., None, :], q)) @ v


@near_miss("is also used by")
def gated_weights_used_elsewhere(q, k, v, steps):
    weights = scores(q, k) * hidden(differences(steps.cumsum(-1)), q)
    return weights @ v, weights.amax(-1)


@near_miss("is not the sum of the weights")
def gated_and_divided_by_columns(q, k, v, steps):
    weights = scores(q.sigmoid(), k.sigmoid()) * hidden(differences(steps.cumsum(-1)), q)
    return (weights / weights.sum(-2, keepdim=True)) @ v


@near_miss("is not the sum of the weights")
def divided_by_the_sum_over_heads(q, k, v, steps):
    weights = scores(q.sigmoid(), k.sigmoid()) * hidden(differences(steps.cumsum(-1)), q)
    return (weights / (weights.sum(1, keepdim=True) + 1.0)) @ v


@near_miss(UNPROVEN, plain)
def growing_instead_of_decaying(q, k, v, _):
    return (scores(q, k) * (1.1 ** distance(q)).tril()) @ v


@near_miss(UNPROVEN, plain)
def infinite_distance_times_data(q, k, v, rate):
    steps = distance(q).float().masked_fill(future(q), float("inf"))
    return (scores(q, k) * torch.nan_to_num(torch.exp(-steps * rate[:, None, None]))) @ v


@near_miss(UNPROVEN, plain)
def overflow_replaced_by_one(q, k, v, _):
    matrix = (0.97 ** distance(q)) * causal(q)
    return (scores(q, k) * torch.nan_to_num(matrix, nan=1.0)) @ v


@near_miss(UNPROVEN, plain)
def zeros_replaced_in_place(q, k, v, _):
    matrix = (0.97 ** distance(q)) * causal(q)
    matrix[matrix == 0] = 0.5
    return (scores(q, k) * matrix) @ v


def with_a_long_matrix() -> tuple[Tensor, ...]:
    """q, k, v, and a matrix of decays for more tokens, as modules keep one."""
    q, k, v, slope = plain()
    return q, k, v, decay_of(slope, torch.ones(1, 1, S + 5, 1))


@near_miss("comes from outside the graph", with_a_long_matrix)
def part_of_a_matrix_from_outside(q, k, v, matrix):
    return (scores(q, k) * matrix[:, : q.shape[2], : q.shape[2]]) @ v


@near_miss(UNPROVEN, plain)
def matrix_divided_by_its_columns_and_rows(q, k, v, slope):
    matrix = decay_of(slope, q)
    return (scores(q, k) * (matrix / (matrix.sum(-1, keepdim=True) + matrix.sum(-2, keepdim=True)))) @ v


@near_miss("a polynomial of degree 2", plain)
def polynomial_of_the_scores(q, k, v, _):  # Arora et al. 2024, arXiv:2402.18668
    weights = scores(q * D**-0.5, k)
    weights = (1 + weights + 0.5 * weights**2).masked_fill(future(q), 0)
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-6)


@near_miss("a polynomial of degree 2", plain)
def square_of_the_scores(q, k, v, _):  # fla-org/flash-linear-attention, ops/rebased/naive.py
    return (scores(q, k) ** 2).tril() @ v


@near_miss("pow between", plain)
def square_of_the_rectified_scores(q, k, v, _):
    return (scores(q, k).relu() ** 2).tril() @ v


# Sums of broadcast products along other dimensions.


@near_miss("", plain)
def summed_over_the_queries(q, k, v, _):
    return (q[:, :, :, None] * k[:, :, None]).sum(2), v


@near_miss("", plain)
def rows_of_what_one_alone_has(q, k, v, _):
    return (q[..., :, None] * v[..., None, :]).sum(-1), k


@near_miss("", plain)
def squared_norms(q, k, v, _):
    return q * (k * k).sum(-1, keepdim=True), v
