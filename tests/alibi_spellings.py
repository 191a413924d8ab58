"""Biases that are linear in the distance, spelled in many ways; and near misses with one detail changed."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from attnopt.mask import CAUSAL, FULL, Causal, Length, Mask, Window
from attnopt.spec import Alibi

B, H, S, D = 2, 4, 13, 8
SCALE = 0.25
Function = Callable[..., Tensor]

#: function -> mask and line that are read.
SPELLINGS: dict[Function, tuple[Mask, Alibi]] = {}
#: functions whose bias looks like a line and is none: read as a tensor.
NEAR_MISSES: list[Function] = []


def spelling(mask: Mask = CAUSAL, alibi: Alibi = Alibi()) -> Callable[[Function], Function]:  # noqa: B008 - frozen
    def note(function: Function) -> Function:
        SPELLINGS[function] = mask, alibi
        return function

    return note


def near_miss(function: Function) -> Function:
    NEAR_MISSES.append(function)
    return function


def inputs(heads: int = H, sq: int = S, sk: int = S) -> list[Tensor]:
    """q, k, v and slopes (H,)."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, heads, n, D) for n in (sq, sk, sk))
    return [q, k, v, 2.0 ** -torch.arange(1.0, heads + 1)]


def distance(sq: int, sk: int) -> Tensor:
    """j - i, the last query at the last key: int64 (Sq, Sk)."""
    return torch.arange(sk)[None, :] - torch.arange(sk - sq, sk)[:, None]


def causal(q: Tensor, k: Tensor) -> Tensor:
    return distance(q.shape[2], k.shape[2]) <= 0


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, hidden: Tensor | None = None) -> Tensor:
    """Attention with a bias, causal unless told otherwise."""
    scores = q @ k.mT * SCALE + bias
    hidden = ~causal(q, k) if hidden is None else hidden
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@spelling()
def slope_times_distance(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return attend(q, k, v, slopes.view(-1, 1, 1) * distance(q.shape[2], k.shape[2]))


@spelling()
def distance_backwards_subtracted(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    away = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    scores = q @ k.mT * SCALE - away.to(q.dtype)[None] * slopes[:, None, None]
    return scores.masked_fill(~causal(q, k), -torch.inf).softmax(-1) @ v


@spelling()
def slope_times_position(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return attend(q, k, v, slopes[:, None, None] * torch.arange(k.shape[2]))  # HF bloom


@spelling()
def position_counted_from_the_end(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    places = torch.arange(1 - k.shape[2], 1, dtype=torch.int32).view(1, 1, 1, -1)  # HF mpt
    scores = q @ k.mT * SCALE + (places * slopes.view(1, -1, 1, 1)).squeeze(0)
    return torch.masked_fill(scores, ~causal(q, k), torch.finfo(q.dtype).min).softmax(-1) @ v


@spelling()
def baddbmm_with_merged_heads(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    b, h, n, d = q.shape  # HF bloom
    bias = (slopes[:, None, None] * torch.arange(n)).repeat(b, 1, 1)
    q, k = (x.reshape(b * h, n, d) for x in (q, k))
    scores = bias.baddbmm(batch1=q, batch2=k.mT, beta=1.0, alpha=SCALE).view(b, h, n, n)
    scores = scores + scores.new_full((n, n), torch.finfo(scores.dtype).min).triu(1)
    return functional.softmax(scores, dim=-1) @ v


@spelling()
def sdpa_with_line_and_mask_in_one(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    bias = slopes.view(1, -1, 1, 1) * distance(q.shape[2], k.shape[2])
    bias = bias.masked_fill(~causal(q, k), -torch.inf)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=SCALE)


@spelling()
def sdpa_with_line_plus_mask(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    hidden = torch.full((q.shape[2], k.shape[2]), -torch.inf).triu(1)
    bias = slopes.view(1, -1, 1, 1) * distance(q.shape[2], k.shape[2]) + hidden
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=SCALE)


@spelling()
def where_between_line_and_lowest(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    lowest = torch.finfo(q.dtype).min
    bias = torch.where(causal(q, k), slopes[:, None, None] * distance(q.shape[2], k.shape[2]), lowest)
    return functional.softmax(q @ k.mT * SCALE + bias, -1) @ v


@spelling()
def inside_the_scale(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    bias = slopes[:, None, None] * torch.arange(k.shape[2])  # HF falcon
    scores = (q @ k.mT + bias) * SCALE
    return scores.masked_fill(~causal(q, k), -torch.inf).softmax(-1) @ v


@spelling()
def outer_product(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return attend(q, k, v, torch.outer(slopes, torch.arange(k.shape[2], dtype=q.dtype))[:, None])


@spelling()
def einsum_of_slopes_and_distances(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    away = distance(q.shape[2], k.shape[2]).to(slopes.dtype)
    return attend(q, k, v, torch.einsum("h,ij->hij", slopes, away))


@spelling()
def magnitude_under_a_causal_mask(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return attend(q, k, v, -slopes.view(-1, 1, 1) * distance(q.shape[2], k.shape[2]).abs())


@spelling(FULL, Alibi(symmetric=True))
def magnitude(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    places = torch.arange(k.shape[2])  # encoders with ALiBi
    bias = (places[None, :] - places[:, None]).abs().unsqueeze(0) * -slopes[:, None, None]
    return functional.softmax(q @ k.mT * SCALE + bias, -1) @ v


@spelling(FULL, Alibi(symmetric=True))
def smaller_minus_larger(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    places = torch.arange(k.shape[2], dtype=torch.float32)
    bias = -torch.abs(places.view(1, -1) - places.view(-1, 1)) * slopes.view(1, -1, 1, 1)
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=SCALE)


@spelling(CAUSAL & Window(5))
def with_a_window(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    away = distance(q.shape[2], k.shape[2])
    return attend(q, k, v, slopes[:, None, None] * away, (away > 0) | (away <= -5))


@spelling()
def slopes_written_out(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    del slopes
    numbers = torch.tensor([2 ** (-8 * (n + 1) / H) for n in range(H)], dtype=q.dtype)
    return attend(q, k, v, numbers.view(1, H, 1, 1) * distance(q.shape[2], k.shape[2]))


@spelling()
def one_number_for_all_heads(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    del slopes
    return attend(q, k, v, 0.3 * distance(q.shape[2], k.shape[2]))


@spelling()
def slopes_as_powers(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    del slopes
    base = torch.full((), 2.0 ** (-(2.0 ** -(math.log2(H) - 3))), dtype=q.dtype)  # HF bloom
    numbers = torch.pow(base, torch.arange(1, 1 + H, dtype=torch.int32))
    return attend(q, k, v, numbers[..., None, None] * torch.arange(k.shape[2])[None, None])


@spelling()
def slopes_joined_from_two_series(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    del slopes
    first = torch.pow(0.5, torch.arange(1, 3, dtype=q.dtype))
    numbers = torch.cat([first, torch.pow(0.7, torch.arange(1, 5, 2, dtype=q.dtype))])
    return attend(q, k, v, -numbers.view(H, 1, 1) * -distance(q.shape[2], k.shape[2]))


@spelling()
def slopes_divided_by_a_number(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return attend(q, k, v, slopes[:, None, None] * distance(q.shape[2], k.shape[2]) / 3.0)


@spelling()
def slopes_of_each_sequence(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    both = torch.stack([slopes, 3 * slopes])
    return attend(q, k, v, both[:, :, None, None] * distance(q.shape[2], k.shape[2]))


@spelling(CAUSAL, Alibi())
def distance_shifted(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return attend(q, k, v, slopes[:, None, None] * (distance(q.shape[2], k.shape[2]) - 3))


@spelling(FULL, Alibi(Length(3), symmetric=True))
def magnitude_shifted(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    bias = -slopes[:, None, None] * (distance(q.shape[2], k.shape[2]) - 3).abs()
    return functional.softmax(q @ k.mT * SCALE + bias, -1) @ v


@spelling(Causal(Length(2)), Alibi(Length(2)))
def later_diagonal(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    away = distance(q.shape[2], k.shape[2])
    return attend(q, k, v, slopes[:, None, None] * away, away > 2)


@near_miss
def slope_that_varies_along_the_queries(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    steep = slopes[:, None, None] * q[0, 0, :, :1].sigmoid()[None]
    return attend(q, k, v, steep * distance(q.shape[2], k.shape[2]))


@near_miss
def slope_that_varies_along_the_keys(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    steep = slopes[:, None, None] * k[0, 0, :, 0].sigmoid()
    return attend(q, k, v, steep * distance(q.shape[2], k.shape[2]))


@near_miss
def square_of_the_position(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    places = torch.arange(k.shape[2])
    return attend(q, k, v, slopes[:, None, None] * (places * places))


@near_miss
def product_of_positions(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    places = torch.arange(k.shape[2])
    return attend(q, k, v, slopes[:, None, None] * (places * places[:, None]))


@near_miss
def clipped_distance(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return attend(q, k, v, slopes[:, None, None] * distance(q.shape[2], k.shape[2]).clamp(min=-4))


@near_miss
def halved_distance(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return attend(q, k, v, slopes[:, None, None] * (distance(q.shape[2], k.shape[2]) // 2))


@near_miss
def logarithm_of_the_distance(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    away = distance(q.shape[2], k.shape[2]).abs().to(q.dtype)  # Kerple, arXiv:2205.09921
    return attend(q, k, v, -slopes[:, None, None] * torch.log(1 + away))


@near_miss
def root_of_the_distance(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    away = distance(q.shape[2], k.shape[2]).abs().to(q.dtype)
    return attend(q, k, v, -slopes[:, None, None] * away.sqrt())


@near_miss
def rounded_to_half(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    bias = slopes[:, None, None] * distance(q.shape[2], k.shape[2]) * 1.001
    return attend(q, k, v, bias.bfloat16().to(q.dtype))


@near_miss
def multiplied_in_half(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    bias = slopes[:, None, None].bfloat16() * distance(q.shape[2], k.shape[2])  # HF falcon
    return attend(q, k, v, bias.to(q.dtype))


@near_miss
def distance_only_on_one_side(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    away = distance(q.shape[2], k.shape[2])
    bias = torch.where(away <= 0, slopes[:, None, None] * away, 0.0)
    return attend(q, k, v, bias, torch.zeros_like(away, dtype=torch.bool))


@near_miss
def two_slopes(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    away = distance(q.shape[2], k.shape[2])  # steeper to the right
    bias = torch.where(away <= 0, slopes[:, None, None] * away, -2 * slopes[:, None, None] * away)
    return attend(q, k, v, bias, torch.zeros_like(away, dtype=torch.bool))


@near_miss
def far_keys_count_less(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    away = distance(q.shape[2], k.shape[2])
    return attend(q, k, v, torch.where(away > -4, slopes[:, None, None], slopes[:, None, None] / 2) * away)


@near_miss
def plus_a_bias_of_pairs(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    pairs = q[:1, :1, :, :1] * k[:1, :1, :, :1].mT
    return attend(q, k, v, slopes[:, None, None] * distance(q.shape[2], k.shape[2]) + pairs)


@near_miss
def positions_from_data(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    places = (k[:, 0, :, 0] > 0).long().cumsum(-1)  # HF bloom, padded
    return attend(q, k, v, slopes[:, None, None] * places[:, None, None, :])


@near_miss
def negated_beyond_the_window(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    away = distance(q.shape[2], k.shape[2])
    return attend(q, k, v, slopes[:, None, None] * torch.where(away < -6, -away, away))


@near_miss
def wrapped_distance(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    return attend(q, k, v, slopes[:, None, None] * (torch.arange(k.shape[2]) % 5))


@near_miss
def lowest_that_does_not_absorb(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    bias = slopes[:, None, None] * distance(q.shape[2], k.shape[2])
    return functional.softmax(q @ k.mT * SCALE + bias.masked_fill(~causal(q, k), -100.0), -1) @ v
