"""Programs that somebody may well write, and that a rewrite may well get wrong: hooks, writes, views, casts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from torch import Tensor
from torch.utils.checkpoint import checkpoint

B, H, S, T, D = 2, 3, 6, 9, 8
SCALE = D**-0.5
#: Sizes that stay numbers where others are symbolic.
FIXED = (H, D)


@dataclass(frozen=True)
class Adversary:
    """attend: a function of q (B, H, S, D), k and v (B, H, T, D) and `more`. fixed: the sizes are not free."""

    attend: Callable[..., Any]
    more: Callable[[], tuple[Tensor, ...]]
    differentiable: int
    square: bool
    fixed: bool
    dtype: torch.dtype

    def inputs(self) -> list[Tensor]:
        """q, k, v and what else it takes."""
        torch.manual_seed(0)
        keys = S if self.square else T
        heads = [torch.randn(B, H, n, D).to(self.dtype) for n in (S, keys, keys)]
        return [*heads, *self.more()]


ADVERSARIES: list[Adversary] = []


def adversary(
    more: Callable[[], tuple[Tensor, ...]] = tuple,
    *,
    differentiable: int = 3,
    square: bool = False,
    fixed: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Callable[..., Any]:
    """Adds the function to ADVERSARIES."""

    def add(attend: Callable[..., Any]) -> Callable[..., Any]:
        ADVERSARIES.append(Adversary(attend, more, differentiable, square, fixed, dtype))
        return attend

    return add


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) * SCALE


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scores(q, k).softmax(-1) @ v


def causal(q: Tensor, k: Tensor) -> Tensor:
    """True where a query must not look."""
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1 + k.shape[-2] - q.shape[-2])


def keep() -> tuple[Tensor, ...]:
    kept = torch.ones(B, 1, 1, T, dtype=torch.bool)
    kept[0, ..., :3] = False
    return (kept,)


# --- gradients that stop, or are changed, somewhere inside ---


@adversary()
def mask_of_the_largest_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    with torch.no_grad():
        least = s.topk(3, -1).values[..., -1:]
    return s.masked_fill(s < least, -torch.inf).softmax(-1) @ v


@adversary()
def queries_detached_in_the_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q.detach(), k, v) + q


@adversary()
def maximum_taken_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    with torch.no_grad():
        top = s.amax(-1, keepdim=True)
    e = (s - top).exp()
    return (e / e.sum(-1, keepdim=True)) @ v


@adversary()
def sum_taken_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = scores(q, k).exp()
    return (e / e.sum(-1, keepdim=True).detach()) @ v


@adversary()
def weights_detached_for_the_values_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1)
    return w.detach() @ v + (w @ v.detach()) * 2


@adversary()
def keys_made_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        turned = F.normalize(k, dim=-1) * 3
    return plain(q, turned, v)


@adversary()
def second_attention_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = plain(q, k, v)
    with torch.set_grad_enabled(False):
        second = plain(first, k, v)
    return first + second


@adversary()
def gradient_wanted_inside_no_grad(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        s = scores(q, k)
        with torch.enable_grad():
            out = s.softmax(-1) @ v
    return out


@adversary()
def hook_on_the_output(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = plain(q, k, v)
    if out.requires_grad:
        out.register_hook(lambda g: g * 2)
    return out * 1.5


@adversary()
def hook_on_the_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1)
    if w.requires_grad:
        w.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return w @ v


@adversary()
def hook_on_turned_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turned = v.flip(-1)
    if turned.requires_grad:
        turned.register_hook(lambda g: g * 3)
    return plain(q, k, turned)


@adversary()
def gradient_of_the_scores_is_clipped_by_where(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return torch.where(s.abs() < 1, s, s.detach()).softmax(-1) @ v


@adversary(lambda: (torch.randn(H, S, T),), differentiable=4)
def bias_alone_learns(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (scores(q.detach(), k.detach()) + bias).softmax(-1) @ v.detach()


@adversary()
def values_alone_learn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q.detach(), k.detach(), v)


# --- checkpoints ---


@adversary(fixed=True)  # Dynamo itself fails on it with free sizes
def checkpoint_around_one_of_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = checkpoint(plain, q, k, v, use_reentrant=False)
    return plain(first, k, v) + first


@adversary()
def checkpoint_inside_a_checkpoint(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def outer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(plain, q.tanh(), k, v, use_reentrant=False).sin()

    return checkpoint(outer, q, k, v, use_reentrant=False)


@adversary()
def checkpoint_with_a_mask_from_outside(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = causal(q, k)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scores(q, k).masked_fill(hidden, -torch.inf).softmax(-1) @ v

    return checkpoint(masked, q, k, v, use_reentrant=False)


@adversary()
def checkpoint_that_returns_its_scores(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        s = scores(q, k)
        return s.softmax(-1) @ v, s

    out, s = checkpoint(both, q, k, v, use_reentrant=False)
    return out, s.logsumexp(-1)


# --- autocast and casts ---


@adversary(differentiable=0)
def autocast_off_around_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = q @ k.mT
        with torch.autocast("cpu", enabled=False):
            w = (s.to(q.dtype) * SCALE).softmax(-1)
        return w @ v


@adversary()
def autocast_for_the_scores_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = q @ k.mT
    return (s.to(v.dtype) * SCALE).softmax(-1) @ v


@adversary(dtype=torch.bfloat16)
def values_wider_than_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    wide = torch.promote_types(v.dtype, torch.float32)
    return scores(q, k).to(wide).softmax(-1) @ v.to(wide)


@adversary(lambda: (torch.randn(H, S, T),), differentiable=4, dtype=torch.bfloat16)
def wide_bias_on_narrow_scores(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (scores(q, k) + bias).softmax(-1).to(v.dtype) @ v


@adversary(lambda: (torch.rand(H, 1, 1) + 0.5, torch.randn(H, S, T)), dtype=torch.bfloat16)
def wide_scale_on_a_narrow_sum(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return ((scores(q, k) + bias.to(q.dtype)) * scale).softmax(-1).to(v.dtype) @ v


# --- writes in place and views ---


@adversary()
def residual_added_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = plain(q, k, v)
    out += q
    return out


@adversary(lambda: (torch.randn(H, S, T),), differentiable=4)
def bias_written_to_afterwards(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    own = bias * 1
    out = (scores(q, k) + own).softmax(-1) @ v
    own[:, 0] = 0.0
    return out, own


@adversary()
def values_written_through_another_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    own = v * 1
    turned = own.transpose(1, 2)
    own[:, :, 0] = 0.0
    return scores(q, k).softmax(-1) @ turned.transpose(1, 2)


@adversary()
def cache_filled_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keys, values = torch.zeros_like(k).repeat(1, 1, 2, 1), torch.zeros_like(v).repeat(1, 1, 2, 1)
    n = k.shape[2]
    keys[:, :, :n].copy_(k)
    values[:, :, :n] = v
    hidden = torch.arange(2 * n) >= n
    return scores(q, keys).masked_fill(hidden, -torch.inf).softmax(-1) @ values


@adversary()
def mask_written_to_between_two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype)
    first = (scores(q, k) + mask).softmax(-1) @ v
    mask[:, 0] = -torch.inf
    return (scores(first, k) + mask).softmax(-1) @ v


@adversary()
def boolean_mask_narrowed_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shown = ~causal(q, k)
    shown &= torch.arange(k.shape[-2]) != 1
    shown[:, 0] = True
    return scores(q, k).masked_fill(~shown, -torch.inf).softmax(-1) @ v


@adversary()
def first_key_hidden_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s[..., 0] = -torch.inf
    return s.softmax(-1) @ v


@adversary()
def scores_of_some_keys_raised_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    s[..., :2] += 1.0
    return s.softmax(-1) @ v


@adversary()
def softmax_by_hand_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    e = (scores(q, k) - scores(q, k).amax(-1, keepdim=True).detach()).exp()
    total = e.sum(-1, keepdim=True)
    return e.div(total).mul_(1.0) @ v


@adversary()
def part_of_the_output_replaced(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = plain(q, k, v)
    out[:, :, 0] = v[:, :, 0]
    return out.transpose(1, 2).flatten(2)


# --- things used twice, and softmaxes that are not what they seem ---


@adversary()
def attention_in_both_directions(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = scores(q, k)
    return s.softmax(-1) @ v, s.softmax(-2).mT @ q


@adversary()
def two_values_for_the_same_weights(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    w = scores(q, k).softmax(-1)
    return w @ v, w @ k


@adversary(square=True)
def one_tensor_is_all_three(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = q + k + v
    return plain(x, x, x)


@adversary()
def refined_three_times(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    for _ in range(3):
        q = F.layer_norm(q + plain(q, k, v), (D,))
    return q


@adversary()
def entropy_of_the_weights_as_well(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    w = scores(q, k).softmax(-1)
    return w @ v, -(w * (w + 1e-9).log()).sum(-1)


@adversary()
def softmax_over_keys_and_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    return s.flatten(-2).softmax(-1).view_as(s) @ v


@adversary(keep)
def weights_masked_and_summed_to_one_again(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    w = scores(q, k).softmax(-1) * kept
    return (w / (w.sum(-1, keepdim=True) + 1e-6)) @ v


@adversary(keep)
def masked_by_a_product_and_a_small_number(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    m = kept.to(q.dtype)
    return (scores(q, k) * m + (1 - m) * -1e4).softmax(-1) @ v


@adversary(lambda: (torch.randn(H),), differentiable=4)
def learned_temperature_that_is_clamped(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> Tensor:
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    return (q @ k.mT * t.exp().clamp(max=2.0)[:, None, None]).softmax(-1) @ v


@adversary(lambda: (torch.rand(1, H, 1, 1),), differentiable=4)
def heads_weighted_after_the_softmax(q: Tensor, k: Tensor, v: Tensor, head: Tensor) -> Tensor:
    return (scores(q, k).softmax(-1) * head) @ v


@adversary(lambda: (torch.randn(1, H, 1, D), torch.randn(1, H, 1, D)), differentiable=5)
def a_learned_key_in_front(q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor) -> Tensor:
    k = torch.cat((key.expand(k.shape[0], -1, -1, -1), k), 2)
    v = torch.cat((value.expand(v.shape[0], -1, -1, -1), v), 2)
    return plain(q, k, v)


@adversary()
def heads_that_see_differently(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    s = scores(q, k)
    half = s[:, :1].masked_fill(causal(q, k), -torch.inf)
    return torch.cat((half, s[:, 1:]), 1).softmax(-1) @ v


@adversary()
def first_query_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return plain(q, k, v)[:, :, 0].flatten(1)


@adversary()
def scores_the_other_way_round(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (v.mT @ (k @ q.mT * SCALE).softmax(-2)).mT


@adversary(square=True)
def skewed_relative_positions(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[-2]
    table = torch.linspace(-1, 1, 2 * n - 1, dtype=q.dtype)
    at = torch.arange(n)
    return (scores(q, k) + table[at[None] - at[:, None] + n - 1]).softmax(-1) @ v


@adversary(keep)
def rows_without_keys_made_zero(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> Tensor:
    kept = kept & (torch.arange(q.shape[-2]) > 0)[:, None]
    return scores(q, k).masked_fill(~kept, -torch.inf).softmax(-1).nan_to_num(0.0) @ v
