"""Functions that look like linear attention and are not, or not one that a kernel serves."""

import torch
from linear_spellings import D, causal, decay_of, distance, grouped, near_miss, padded, plain, scores
from torch.nn import functional

UNPROVEN = "not proven to be a mask or a decay"


@near_miss("not the diagonal")
def diagonal_left_out(q, k, v, _):
    return scores(q, k).tril(-1) @ v


@near_miss("not the diagonal")
def diagonal_one_too_far(q, k, v, _):
    return scores(q, k).tril(1) @ v


@near_miss("mask")
def upper_triangle(q, k, v, _):
    return scores(q, k).triu() @ v


@near_miss("mask")
def window_instead_of_a_triangle(q, k, v, _):
    return (scores(q, k) * (causal(q) & (distance(q) < 4))) @ v


@near_miss(UNPROVEN)
def decay_both_ways(q, k, v, slope):
    return (scores(q, k) * torch.exp(-slope[:, None, None] * distance(q).abs())) @ v


@near_miss(UNPROVEN)
def decay_with_the_square_of_the_distance(q, k, v, slope):
    return (scores(q, k) * torch.exp(-slope[:, None, None] * distance(q) ** 2).tril()) @ v


@near_miss(UNPROVEN)
def decay_by_the_root_of_the_distance(q, k, v, slope):
    return (scores(q, k) * torch.exp(-slope[:, None, None] * distance(q).abs().sqrt()).tril()) @ v


@near_miss(UNPROVEN)
def decay_that_starts_one_step_late(q, k, v, slope):
    return (scores(q, k) * torch.exp(-slope[:, None, None] * (distance(q) - 1)).tril()) @ v


@near_miss(UNPROVEN)
def decay_with_the_sum_of_positions(q, k, v, base):
    at = torch.arange(q.shape[2])
    return (scores(q, k) * (base[:, None, None] ** (at[:, None] + at[None, :])).tril()) @ v


@near_miss(UNPROVEN)
def linear_fading(q, k, v, slope):
    return (scores(q, k) * (1 - 0.01 * slope[:, None, None] * distance(q)).tril()) @ v


def with_a_matrix():
    q, k, v, slope = plain()
    return q, k, v, decay_of(slope, q)


@near_miss("comes from outside the graph", with_a_matrix)
def decay_from_outside(q, k, v, matrix):
    return (scores(q, k) * matrix) @ v


@near_miss("a polynomial of degree 2")
def squared_scores(q, k, v, _):
    weights = scores(q, k)
    return (weights * weights).tril() @ v


@near_miss("relu between")
def rectified_scores(q, k, v, _):
    return scores(q, k).relu() @ v


@near_miss("add between")
def scores_with_a_bias(q, k, v, _):
    return (scores(q, k) + distance(q)).tril() @ v


@near_miss("is also used by")
def weights_used_elsewhere(q, k, v, _):
    weights = scores(q, k).tril()
    return weights @ v, weights.amax(-1)


@near_miss("is also used by")
def scores_used_elsewhere(q, k, v, _):
    found = scores(q, k)
    return found.tril() @ v + found.mean()


@near_miss("is not the sum of the weights")
def divided_by_the_sum_over_queries(q, k, v, _):
    weights = scores(q.sigmoid(), k.sigmoid()).tril()
    return (weights / weights.sum(-2, keepdim=True)) @ v


@near_miss("sums other weights")
def divided_by_the_sum_without_decay(q, k, v, slope):
    found = scores(q.sigmoid(), k.sigmoid()).tril()
    return ((found * decay_of(slope, q)) / found.sum(-1, keepdim=True)) @ v


@near_miss("is detached")
def divided_by_a_sum_that_is_detached_in_part(q, k, v, slope):
    found, decay = scores(q, k), decay_of(slope, q)
    weights = found * decay
    total = (found.detach() * decay).sum(-1, keepdim=True)
    return (weights / total.abs().clamp(min=1)) @ v


@near_miss("is no sum of weights")
def divided_by_the_sum_of_lengths(q, k, v, slope):
    weights = scores(q, k) * decay_of(slope, q)
    return (weights / weights.abs().sum(-1, keepdim=True)) @ v


@near_miss("is no sum of weights")
def divided_by_a_sum_bounded_on_both_sides(q, k, v, slope):
    weights = scores(q, k) * decay_of(slope, q)
    return (weights / weights.sum(-1, keepdim=True).abs().clamp(min=1, max=50)) @ v


@near_miss("written to in place")
def keys_written_to_in_place(q, k, v, _):
    k = k * 1.5
    found = scores(q, k)
    k.add_(1)
    return found.tril() @ (v + k.sum())


@near_miss("")
def mask_of_softmax(q, k, v, _):
    return scores(q, k).masked_fill(~causal(q), float("-inf")).softmax(-1) @ v


@near_miss("")
def two_layers(q, k, v, _):
    wide = torch.ones(D, 32).to(q.dtype)
    return functional.gelu(q @ wide) @ wide.T + v.mean()


def with_matrices():
    return torch.randn(2, 7, D), torch.randn(D, 32), torch.randn(D, 32), torch.randn(32, D)


@near_miss("", with_matrices)
def gated_layers(x, up, gate, down):
    return ((x @ up) * (x @ gate)) @ down


@near_miss("", with_matrices)
def low_rank_update(x, up, _, down):
    return x + 0.5 * ((x @ up) @ down)


EXPERTS = [torch.nn.Parameter(torch.randn(4, *shape)) for shape in ((D, 32), (32, D))]


@near_miss("", lambda: (torch.randn(4, 7, D),))
def experts_without_an_activation(x):
    up, down = EXPERTS
    return torch.bmm(torch.bmm(x, up.to(x.dtype)), down.to(x.dtype))


@near_miss("", with_matrices)
def projected_output_of_softmax(x, up, gate, down):
    weights = ((x @ up) @ (x @ gate).mT).softmax(-1)
    return (weights @ (x @ up)) @ down


@near_miss("")
def one_product(q, k, v, _):
    return scores(q, k).tril() @ v.new_ones(v.shape[2], 1)


@near_miss("", padded)
def keys_alone(q, k, v, keep):
    return (k * keep[:, None, :, None]).mT @ v, q


@near_miss("", grouped)
def queries_alone(q, k, v, _):
    return q @ k[:, :1].mT, v
