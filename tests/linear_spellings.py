"""Linear attention as real code spells it: functions to read, each with what it means, and functions that only look so.

The sources are named in the comments. Each function takes q, k (B, H, S, D), v (B, H, S, DV), and most a tensor
of slopes (H,), above 0, or of bases (H,), between 0 and 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

B, H, HKV, S, D, DV = 2, 4, 2, 19, 8, 12
#: Sizes that a model fixes; the others are symbolic when a test asks for that.
FIXED = frozenset({H, HKV, D, DV})


@dataclass(frozen=True)
class Spelling:
    """attend: computes the attention of `inputs()`; spec: the line that the report must print."""

    attend: Callable[..., Tensor]
    spec: str
    inputs: Callable[[], tuple[Tensor, ...]]

    @property
    def name(self) -> str:
        return self.attend.__name__


@dataclass(frozen=True)
class NearMiss:
    """attend: no linear attention that can be served; reason: what the report must say, "" where it must be silent."""

    attend: Callable[..., Tensor]
    reason: str
    inputs: Callable[[], tuple[Tensor, ...]]

    @property
    def name(self) -> str:
        return self.attend.__name__


SPELLINGS: list[Spelling] = []
NEAR_MISSES: list[NearMiss] = []


def plain() -> tuple[Tensor, ...]:
    """q, k, v of one head count, and numbers per head between 0 and 1."""
    return (*(torch.randn(B, H, S, width) for width in (D, D, DV)), torch.rand(H) * 0.4 + 0.5)


def grouped() -> tuple[Tensor, ...]:
    """As `plain`, with fewer heads in k and v."""
    q, _, _, rates = plain()
    return q, torch.randn(B, HKV, S, D), torch.randn(B, HKV, S, DV), rates


def gated() -> tuple[Tensor, ...]:
    """q, k, v, and log decays per token (B, H, S)."""
    return *plain()[:3], -torch.rand(B, H, S)


def padded() -> tuple[Tensor, ...]:
    """q, k, v, and which keys count (B, S)."""
    return *plain()[:3], torch.arange(S)[None, :] < torch.tensor([[S], [S - 6]])


def unbatched() -> tuple[Tensor, ...]:
    """q, k, v of one head, without a batch."""
    return tuple(torch.randn(S, width) for width in (D, D, DV))


def token_first() -> tuple[Tensor, ...]:
    """q, k, v with the tokens before the heads, (B, S, H, D)."""
    return tuple(torch.randn(B, S, H, width) for width in (D, D, DV))


def in_half() -> tuple[Tensor, ...]:
    """As `plain`, in bf16; the rates stay fp32."""
    q, k, v, rates = plain()
    return q.bfloat16(), k.bfloat16(), v.bfloat16(), rates


def spelling(
    spec: str, inputs: Callable[[], tuple[Tensor, ...]] = plain
) -> Callable[..., Callable[..., Tensor]]:
    """Registers a function as a spelling of `spec`."""

    def register(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        SPELLINGS.append(Spelling(attend, f"linear {spec}", inputs))
        return attend

    return register


def near_miss(
    reason: str, inputs: Callable[[], tuple[Tensor, ...]] = plain
) -> Callable[..., Callable[..., Tensor]]:
    """Registers a function as a near miss that is refused for `reason`, or passed over in silence."""

    def register(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        NEAR_MISSES.append(NearMiss(attend, reason, inputs))
        return attend

    return register


def causal(x: Tensor) -> Tensor:
    n = x.shape[2]
    return torch.ones(n, n, dtype=torch.bool, device=x.device).tril()


def distance(x: Tensor) -> Tensor:
    """(S, S): i - j."""
    at = torch.arange(x.shape[2], device=x.device)
    return at[:, None] - at[None, :]


def decay_of(rates: Tensor, x: Tensor) -> Tensor:
    """(H, S, S): exp(-rate * (i - j)) on and below the diagonal."""
    return torch.exp(-rates[:, None, None] * distance(x)).tril()


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2)


# A triangle, however it is laid over the scores.


@spelling("scale=1 full")
def left_product_without_a_mask(q, k, v, _):
    return scores(q, k) @ v


@spelling("scale=1 causal")
def tril_of_the_scores(q, k, v, _):
    return torch.tril(scores(q, k)) @ v


@spelling("scale=0.5 causal")
def scores_filled_with_zero(q, k, v, _):
    return (scores(q, k) * 0.5).masked_fill(~causal(q), 0) @ v


@spelling("scale=1 causal")
def where_else_a_number(q, k, v, _):
    return torch.where(causal(q), scores(q, k), 0.0) @ v


@spelling("scale=1 causal")
def where_else_zeros_like_the_scores(q, k, v, _):
    weights = scores(q, k)
    return torch.where(~causal(q), torch.zeros_like(weights), weights) @ v


@spelling("scale=1 causal")
def a_mask_of_ones_and_zeros_from_the_left(q, k, v, _):
    return (causal(q).float() * scores(q, k)) @ v


@spelling("scale=0.125 causal")
def scale_in_four_places(q, k, v, _):
    return torch.tril((q / math.sqrt(4.0)) @ (k * 0.5).mT * 0.25) @ (v * 2)


@spelling("scale=0.5 causal")
def product_added_to_nothing(q, k, v, _):
    flat_q, flat_k, flat_v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    found = torch.baddbmm(torch.zeros_like(q[0, 0, :1, 0]), flat_q, flat_k.mT, beta=0, alpha=0.5)
    return (found.tril() @ flat_v).view(*q.shape[:3], v.shape[3])


@spelling("scale=1 causal", token_first)
def tokens_before_heads(q, k, v):
    found = torch.einsum("bqhd,bkhd->bhqk", q, k)
    return torch.einsum("bhqk,bkhd->bqhd", found.tril(), v)


@spelling("scale=1 causal", unbatched)
def one_head_without_a_batch(q, k, v):
    return (q @ k.T).tril() @ v


@spelling("scale=1 causal & padding", padded)
def padded_keys(q, k, v, keep):
    return scores(q, k).masked_fill(~keep[:, None, None, :], 0.0).tril() @ v


# A decay per head (Sun et al. 2023, eq. 5; Qin et al. 2024, eq. 3).


@spelling("scale=1 causal decay per head")
def base_to_the_distance(q, k, v, base):
    steps = distance(q)
    return (scores(q, k) * torch.where(steps >= 0, base[:, None, None] ** steps, 0.0)) @ v


@spelling("scale=1 causal decay per head")
def exp_filled_afterwards(q, k, v, slope):
    steps = distance(q)
    return (torch.exp(-slope[:, None, None] * steps).masked_fill(steps < 0, 0.0) * scores(q, k)) @ v


@spelling("scale=0.25 causal decay per head")  # OpenNLPLab/lightning-attention, linear_attention.py
def exp_of_what_was_filled(q, k, v, slope):
    exponent = (-slope[:, None, None] * distance(q)).masked_fill(distance(q) < 0, float("-inf"))
    weights = (q * 0.25) @ k.mT * exponent.exp()[None]
    return weights.to(v.dtype) @ v


@spelling("scale=1 causal decay per head")  # Press et al. 2022, arXiv:2108.12409, taken as weights
def exp_of_a_mask_and_a_slope(q, k, v, slope):
    hidden = torch.full((q.shape[2], q.shape[2]), float("-inf"), device=q.device).triu(1)
    return (scores(q, k) * torch.exp(hidden - distance(q).abs() * slope[:, None, None])) @ v


@spelling("scale=1 causal decay per head")
def logarithm_times_the_length_of_the_way(q, k, v, base):
    return torch.tril(scores(q, k) * torch.exp(torch.log(base)[:, None, None] * distance(q).abs())) @ v


@spelling("scale=1 causal decay per head")
def mask_and_decay_one_after_the_other(q, k, v, slope):
    beyond = (-slope.view(H, 1, 1) * distance(q).clamp(min=0)).exp()
    return (scores(q, k) * causal(q) * beyond) @ v


@spelling("scale=1 causal decay per head")
def one_number_for_all_heads(q, k, v, _):
    return (scores(q, k) * (0.9 ** distance(q)).tril()) @ v


@spelling("scale=1 causal decay per head")
def slopes_from_the_number_of_the_head(q, k, v, _):
    slope = 2 ** (-8 * (torch.arange(H, device=q.device) + 1) / H)
    return (scores(q, k) * decay_of(slope, q)) @ v


@spelling("scale=0.353553 causal decay per head")  # fla-org/flash-linear-attention, ops/retention/naive.py
def three_tensors_in_one_einsum(q, k, v, base):
    steps = torch.exp2(distance(q) * base.log2().view(-1, 1, 1)) * (distance(q) >= 0)
    found = torch.einsum("bhqd,bhkd,hqk->bhqk", q * q.shape[-1] ** -0.5, k, steps.to(q.dtype))
    return torch.einsum("bhqk,bhkd->bhqd", found, v)


@spelling("scale=1 causal decay per head")
def everything_in_one_einsum(q, k, v, slope):
    return torch.einsum("bhqd,bhkd,hqk,bhkv->bhqv", q, k, decay_of(slope, q), v)


@spelling("scale=1 gqa=2 causal decay per head", grouped)
def keys_repeated_for_groups(q, k, v, slope):
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    return (scores(q, k) * decay_of(slope, q)) @ v


@spelling("scale=1 gqa=2 causal decay per head", grouped)
def groups_as_a_dimension(q, k, v, slope):
    weights = torch.einsum("bkgid,bkjd->bkgij", q.unflatten(1, (HKV, -1)), k)
    weights = weights * decay_of(slope, q).unflatten(0, (HKV, -1))
    return torch.einsum("bkgij,bkjd->bkgid", weights, v).flatten(1, 2)


@spelling("scale=1 causal decay per head")
def heads_folded_into_the_batch(q, k, v, slope):
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
    weights = torch.bmm(flat[0], flat[1].transpose(1, 2)) * decay_of(slope, q).repeat(q.shape[0], 1, 1)
    return torch.bmm(weights, flat[2]).view(*q.shape[:3], v.shape[3])


@spelling("scale=2 causal decay per head")
def in_place(q, k, v, slope):
    weights = scores(q, k)
    weights *= decay_of(slope, q)
    weights.mul_(2)
    return weights @ v


@spelling("scale=1 causal decay per head", in_half)
def half_precision_weighed_in_single(q, k, v, slope):
    weights = scores(q, k).float() * decay_of(slope, q)
    return weights.to(v.dtype) @ v


@spelling("scale=1 causal decay per token", gated)  # Dao and Gu 2024, arXiv:2405.21060, eq. 5
def decay_of_each_token(q, k, v, steps):
    run = steps.cumsum(-1)
    exponent = run[..., :, None] - run[..., None, :]
    return (scores(q, k) * exponent.masked_fill(~causal(q), float("-inf")).exp()) @ v


# Divided by the sum of the weights.


@spelling("scale=1 causal normalised(eps=1e-06, floor=None)")
def weights_divided_by_their_sum(q, k, v, _):
    weights = scores(functional.elu(q) + 1, functional.elu(k) + 1).tril()
    return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ v


@spelling("scale=0.3 causal decay per head normalised(eps=0, floor=1.0)")  # Sun et al. 2023, section 2.3
def weights_divided_by_a_bounded_sum(q, k, v, slope):
    weights = scores(q, k) * decay_of(slope, q) * 0.3
    return (weights / weights.sum(-1, keepdim=True).abs().clamp(min=1)) @ v


@spelling("scale=1 causal normalised(eps=1e-05, floor=None)")
def output_divided_by_the_sum(q, k, v, _):
    weights = scores(q.sigmoid(), k.sigmoid()).tril()
    return (weights @ v) / (weights.sum(-1, keepdim=True) + 1e-5)


@spelling("scale=1 causal normalised(eps=1e-06, floor=None)")
def output_divided_by_queries_times_running_keys(q, k, v, _):
    q, k = functional.elu(q) + 1, functional.elu(k) + 1
    return (scores(q, k).tril() @ v) / ((q * k.cumsum(-2)).sum(-1, keepdim=True) + 1e-6)


# The right product: keys and values first (Katharopoulos et al. 2020, eq. 5 and 6).


@spelling("scale=1 full")
def right_product(q, k, v, _):
    return q @ (k.mT @ v)


@spelling("scale=0.0441942 full")
def right_product_scaled(q, k, v, _):
    return (q / math.sqrt(D)) @ ((k.mT @ v) / 8)


@spelling(
    "scale=1 full"
)  # lucidrains/linear-attention-transformer; Shen et al. 2021, arXiv:1812.01243, eq. 7
def softmax_of_features_and_of_keys(q, k, v, _):
    state = torch.einsum("bhnd,bhne->bhde", k.softmax(-2), v)
    return torch.einsum("bhnd,bhde->bhne", q.softmax(-1), state)


@spelling(
    "scale=1 full normalised(eps=1e-06, floor=None)", token_first
)  # idiap/fast-transformers, linear_attention.py
def normaliser_in_the_einsum(q, k, v):
    q, k = functional.elu(q) + 1, functional.elu(k) + 1
    state = torch.einsum("nshd,nshm->nhmd", k, v)
    inverse = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
    return torch.einsum("nlhd,nhmd,nlh->nlhm", q, state, inverse).contiguous()


@spelling("scale=1 full normalised(eps=1e-06, floor=None)", token_first)  # zju3dv/LoFTR, linear_attention.py
def values_divided_by_the_length(q, k, v):
    q, k, n = functional.elu(q) + 1, functional.elu(k) + 1, v.shape[1]
    state = torch.einsum("nshd,nshv->nhdv", k, v / n)
    inverse = 1 / (torch.einsum("nlhd,nhd->nlh", q, k.sum(dim=1)) + 1e-6)
    return (torch.einsum("nlhd,nhdv,nlh->nlhv", q, state, inverse) * n).contiguous()


@spelling("scale=1 full normalised(eps=1e-05, floor=None)")
def divided_by_queries_times_the_sum_of_keys(q, k, v, _):
    q, k = q.relu(), k.relu()
    return (q @ (k.mT @ v)) / (q @ k.sum(-2).unsqueeze(-1) + 1e-5)


@spelling("scale=1 full")  # mit-han-lab/efficientvit: channels first, O^T = (V^T K) Q^T
def channels_before_positions(q, k, v, _):
    q, k, v = q.mT.contiguous(), k.mT.contiguous(), v.mT.contiguous()
    return (v @ k.mT) @ q


@spelling("scale=1 full normalised(eps=0, floor=1.0, signed)")
def divided_by_a_sum_that_is_bounded_in_place(q, k, v, _):
    q, k = q.relu(), k.relu()
    total = q @ k.sum(-2).unsqueeze(-1)
    total.clamp_(min=1)
    return (q @ (k.mT @ v)) / total


@spelling("scale=0.5 causal normalised(eps=1e-05, floor=None)")
def output_divided_in_place(q, k, v, _):
    weights = scores(q.sigmoid(), k.sigmoid()).tril() * torch.tensor(0.5, device=q.device)
    out = weights @ v
    out /= weights.sum(-1, keepdim=True) + 1e-5
    return out


@spelling("scale=1 causal")
def one_tensor_of_zeros_for_two(q, k, v, _):
    zeros = torch.zeros(1, 1, device=q.device, dtype=q.dtype)
    first = torch.where(causal(q), scores(q, k), zeros) @ v
    return first + zeros.sum()
