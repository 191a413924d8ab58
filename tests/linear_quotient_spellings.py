"""Linear attention through running sums, divided by a sum that is computed beside them: what is divided is read.

As `linear_spellings`; the sources are named in the comments. q, k, v are (B, S, H, D).
"""

from collections.abc import Callable

import torch
from linear_spellings import NearMiss, Spelling, token_first
from torch import Tensor
from torch.nn import functional

QUOTIENTS: list[Spelling] = []
NEAR: list[NearMiss] = []

SPEC = "linear scale=1 causal"


def spelling(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Registers a function as a spelling of causal linear attention that is divided afterwards."""
    QUOTIENTS.append(Spelling(attend, SPEC, token_first))
    return attend


def near_miss(reason: str) -> Callable[..., Callable[..., Tensor]]:
    """Registers a function that is refused for `reason`, or passed over in silence."""

    def register(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        NEAR.append(NearMiss(attend, reason, token_first))
        return attend

    return register


def positive(x: Tensor) -> Tensor:
    return functional.elu(x) + 1


def inverse_of_running_sum(q: Tensor, k: Tensor, eps: float = 1e-6) -> Tensor:
    return 1 / (torch.einsum("nlhi,nlhi->nlh", q, k.cumsum(1)) + eps)


@spelling  # idiap/fast-transformers, causal_linear_attention.py, the product by einsum
def times_the_inverse_of_a_running_sum(q, k, v):
    q, k = positive(q), positive(k)
    states = torch.einsum("nlhd,nlhm->nlhdm", k, v).cumsum(1)
    return torch.einsum("nlhd,nlhdm->nlhm", q, states) * inverse_of_running_sum(q, k).unsqueeze(-1)


@spelling
def the_inverse_of_a_running_sum_in_the_einsum(q, k, v):
    q, k = positive(q), positive(k)
    states = torch.einsum("nlhd,nlhm->nlhdm", k, v).cumsum(1)
    return torch.einsum("nlhd,nlhdm,nlh->nlhm", q, states, inverse_of_running_sum(q, k))


@spelling  # lucidrains/performer-pytorch, causal_linear_attention_noncuda, one chunk
def the_inverse_under_an_ellipsis(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (positive(q), positive(k), v))
    inverse = 1.0 / torch.einsum("...nd,...nd->...n", q, k.cumsum(dim=-2) + 1e-6)
    states = torch.einsum("...nd,...ne->...nde", k, v).cumsum(dim=-3)
    return torch.einsum("...nde,...nd,...n->...ne", states, q, inverse)


@spelling  # OpenNLPLab/cosFormer, cosformer.py
def divided_by_a_bounded_running_sum(q, k, v):
    at = torch.arange(1, q.shape[1] + 1).view(1, -1, 1, 1) / q.shape[1]
    q, k = (torch.cat([positive(x) * at.sin(), positive(x) * at.cos()], -1) for x in (q, k))
    states = torch.cumsum(torch.einsum("nlhd,nlhm->nlhdm", k, v), 1)
    total = torch.einsum("nlhd,nlhd->nlh", q, k.cumsum(1)).clamp_min(1e-6)
    return torch.einsum("nlhd,nlhdm->nlhm", q, states) / total.unsqueeze(-1)


def second_degree(x: Tensor) -> Tensor:
    """1, x and its products, so that q k^T becomes 1 + q k^T + (q k^T)^2 / 2."""
    squares = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) / 2**0.5
    return torch.cat([torch.ones_like(x[..., :1]), x, squares], -1)


@spelling  # HazyResearch/based, linear_attention.py; Arora et al. 2024, arXiv:2402.18668
def features_of_the_second_degree(q, k, v):
    q, k = second_degree(q * 0.5).unsqueeze(-2), second_degree(k * 0.5).unsqueeze(-2)
    above = (q * (k * v.unsqueeze(-1)).cumsum(1)).sum(-1)
    return above / ((q * k.cumsum(1)).sum(-1) + 1e-6)


@spelling
def divided_by_something_else_entirely(q, k, v):
    states = torch.einsum("nlhd,nlhm->nlhdm", k, v).cumsum(1)
    other = torch.einsum("nlhd,nlhd->nlh", k, q.cumsum(1)).square() + 1
    return torch.einsum("nlhd,nlhdm->nlhm", q, states) / other[..., None]


@near_miss("a weight of its own")
def state_divided_before_the_queries(q, k, v):
    states = torch.einsum("nlhd,nlhm->nlhdm", k, v).cumsum(1)
    return torch.einsum("nlhd,nlhdm->nlhm", q, states / (1 + q.square().sum(-1).cumsum(1))[..., None, None])


@near_miss("divides by a sum as it goes")
def a_running_sum_of_the_output(q, k, v):
    states = torch.einsum("nlhd,nlhm->nlhdm", k, v).cumsum(1)
    return torch.einsum("nlhd,nlhdm->nlhm", q, states.cumsum(1)) * inverse_of_running_sum(q, k)[..., None]


@near_miss("divides by a sum as it goes")
def each_chunk_divided_by_itself(q, k, v):
    rows, state, total = [], 0.0, 0.0
    for q_n, k_n, v_n in zip(*(x.split(5, 1) for x in (positive(q), positive(k), v)), strict=True):
        states = torch.einsum("nlhd,nlhm->nlhdm", k_n, v_n).cumsum(1) + state
        totals = k_n.cumsum(1) + total
        above = torch.einsum("nlhd,nlhdm->nlhm", q_n, states)
        rows.append(above / ((q_n * totals).sum(-1, keepdim=True) + 1e-6))
        state, total = states[:, -1:], totals[:, -1:]
    return torch.cat(rows, 1)
