"""Masks as people spell them, and what each of them is."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

MIN = torch.finfo(torch.float32).min
INF = float("inf")


@dataclass(frozen=True)
class Site:
    """What a spelling has at hand.

    q: (B, H, Sq, 1), k: (B, H, Sk, 1), given: (B, Sk) int64 with values 0, 1, 2, ids: (B, Sk) int64,
    table: (1, 1, 16, 16) bool, pairs: (B, 1, Sq, Sk) bool.
    """

    q: Tensor
    k: Tensor
    given: Tensor
    ids: Tensor
    table: Tensor
    pairs: Tensor

    @property
    def sq(self) -> int:
        return self.q.shape[2]

    @property
    def sk(self) -> int:
        return self.k.shape[2]

    @property
    def past(self) -> int:
        return self.sk - self.sq

    @property
    def i(self) -> Tensor:
        return torch.arange(self.sq)[:, None]

    @property
    def j(self) -> Tensor:
        return torch.arange(self.sk)[None, :]

    def ones(self, dtype: torch.dtype = torch.bool) -> Tensor:
        return torch.ones(self.sq, self.sk, dtype=dtype)

    def full(self, value: float) -> Tensor:
        return torch.full((self.sq, self.sk), value)


def any_lengths(sq: int, sk: int) -> bool:
    return True


def not_fewer_keys(sq: int, sk: int) -> bool:
    return sq <= sk


def as_many_keys(sq: int, sk: int) -> bool:
    return sq == sk


def enough_for_slices(sq: int, sk: int) -> bool:
    return sk >= 3


@dataclass(frozen=True)
class Case:
    """One spelling. expected: the mask in the algebra at symbolic sizes ("none": a float tensor that is no mask)."""

    name: str
    make: Callable[[Site], Tensor]
    expected: str
    fits: Callable[[int, int], bool] = any_lengths
    kind: str = "visible"  # or "hidden": True where hidden; or "additive"


CASES: list[Case] = []


def case(expected: str, *, kind: str = "visible", fits: Callable[[int, int], bool] = any_lengths):
    """Registers a spelling under the name of its function."""

    def register(make: Callable[[Site], Tensor]) -> Callable[[Site], Tensor]:
        CASES.append(Case(make.__name__, make, expected, fits, kind))
        return make

    return register


def inputs(sq: int, sk: int, batch: int = 2, heads: int = 3) -> tuple[Tensor, ...]:
    """Random inputs of a site, in the order of its fields."""
    kept, ids = torch.randint(0, 3, (batch, sk)), torch.randint(0, 4, (batch, sk))
    table, pairs = torch.rand(1, 1, 16, 16) > 0.5, torch.rand(batch, 1, sq, sk) > 0.5
    return torch.ones(batch, heads, sq, 1), torch.ones(batch, heads, sk, 1), kept, ids, table, pairs


visible = case
hidden = partial(case, kind="hidden")
additive = partial(case, kind="additive")


@visible("causal")
def compare_keys_to_queries(s):
    return s.j <= s.i


@visible("causal")
def compare_queries_to_keys(s):
    return s.i >= s.j


@visible("causal")
def strict_comparison_with_the_next(s):
    return torch.arange(s.sk)[None] < torch.arange(1, s.sq + 1)[:, None]


@visible("causal")
def sign_of_the_difference(s):
    return (s.j - s.i) <= 0


@visible("causal")
def distance_that_clamping_leaves_alone(s):
    distance = s.i - s.j
    return distance.clamp(min=0) == distance


@visible("causal")
def float_positions(s):
    return s.i.float() >= s.j.to(torch.float32)


@visible("causal")
def not_later(s):
    return ~(s.j > s.i)


@hidden("causal")
def later(s):
    return s.j > s.i


@hidden("causal")
def upper_triangle_of_ones(s):
    return torch.triu(s.ones(), diagonal=1)


@visible("causal")
def lower_triangle_of_ones(s):
    return s.ones().tril()


@visible("causal")
def lower_triangle_of_float_ones_as_bool(s):
    return torch.tril(s.ones(torch.float32)).view(1, 1, s.sq, s.sk).bool()


@visible("causal")
def lower_triangle_equals_one(s):
    return torch.tril(torch.ones(s.sq, s.sk)) == 1


@visible("causal")
def negated_upper_triangle(s):
    return torch.ones(s.sq, s.sk).triu(1).logical_not()


@visible("causal")
def transposed_upper_triangle(s):
    return torch.ones(s.sk, s.sq, dtype=torch.uint8).triu().t() != 0


@visible("causal")
def meshgrid_of_positions(s):
    i, j = torch.meshgrid(torch.arange(s.sq), torch.arange(s.sk), indexing="ij")
    return i >= j


@visible("causal")
def meshgrid_with_columns_first(s):
    j, i = torch.meshgrid(torch.arange(s.sk), torch.arange(s.sq), indexing="xy")
    return i >= j


@visible("causal")
def running_count_of_ones(s):
    i = torch.ones(s.sq, dtype=torch.int64).cumsum(0) - 1
    return s.j <= i[:, None]


@visible("causal")
def mask_function_over_indices(s):
    b = torch.arange(s.q.shape[0])[:, None, None, None]
    positions = (torch.arange(s.sk) + 0).unsqueeze(0).expand(s.q.shape[0], -1)
    q_index, k_index = s.i[None, None], s.j[None, None]
    result = q_index.new_ones((), dtype=torch.bool)
    return (result & (positions[b, k_index] <= q_index)).expand(s.q.shape[0], -1, s.sq, s.sk)


@visible("causal", fits=not_fewer_keys)
def packed_sequences_of_one(s):
    """Position ids that turn out to be one run: the test for several sequences is always true."""
    positions = (torch.arange(s.sk) + 0).unsqueeze(0).expand(s.q.shape[0], -1)
    first = positions[:, :1] - 1
    packed = (torch.diff(positions, prepend=first, dim=-1) != 1).cumsum(-1)
    same = packed[:, None, : s.sq, None] == packed[:, None, None, :]
    return same & (s.j <= s.i)


@visible("full")
def always(s):
    return (s.i >= 0) & s.ones()


@visible("full")
def bounds_that_hold_everywhere(s):
    return (s.j < s.sk) & (s.i - s.sq < 0) & (s.i + s.j >= 0)


@hidden("first(0)")
def nothing(s):
    return s.ones() | (s.j < s.i)


@additive("causal")
def upper_triangle_of_minus_infinity(s):
    return torch.triu(s.full(-INF), diagonal=1)


@additive("causal")
def upper_triangle_in_place(s):
    mask = torch.full((1, 1, s.sq, s.sk), -INF)
    mask.triu_(1)
    return mask


@additive("causal")
def fill_in_place(s):
    mask = s.full(MIN)
    mask.masked_fill_(torch.arange(s.sk) < (torch.arange(s.sq) + 1).view(s.sq, 1), 0)
    return mask.to(torch.float32)


@additive("causal")
def where_zero_else_least(s):
    return torch.where(s.j <= s.i, torch.zeros(()), MIN)


@additive("causal")
def where_on_scalar_tensors(s):
    return torch.where(s.j > s.i, torch.tensor(-INF), torch.tensor(0.0))


@additive("causal")
def one_minus_mask_times_large(s):
    return (1.0 - torch.tril(s.ones(torch.float32))) * -1e9


@additive("causal")
def one_minus_bool_times_least(s):
    return (1.0 - (s.j <= s.i)[None, None].to(torch.float32)) * MIN


@additive("causal")
def full_times_later(s):
    mask = s.full(MIN)
    mask *= s.j > s.i
    return mask[None, None]


@additive("causal")
def masked_fill_twice(s):
    later = s.ones(torch.float32).triu(1)
    return later.masked_fill(later == 1, -INF).masked_fill(later == 0, 0.0)


@additive("causal")
def half_precision(s):
    return torch.full((s.sq, s.sk), torch.finfo(torch.float16).min, dtype=torch.float16).triu(1)


@additive("causal(Sk-Sq)", fits=not_fewer_keys)
def square_mask_beside_a_cache(s):
    new = torch.where(torch.arange(s.sq) < torch.arange(1, s.sq + 1).view(-1, 1), 0.0, MIN)
    return torch.cat([torch.zeros(s.sq, s.past), new], dim=-1)


@visible("causal(Sk-Sq)")
def queries_after_a_cache(s):
    return s.j <= torch.arange(s.past, s.sk)[:, None]


@visible("causal(Sk-Sq)")
def lower_triangle_with_diagonal(s):
    return s.ones().tril(diagonal=s.past)


@visible("causal(2)")
def columns_before_the_triangle(s):
    return torch.cat([torch.ones(s.sq, 2), torch.ones(s.sq, s.sk).tril()], dim=-1)[:, : s.sk] > 0


@visible("causal(1)")
def padded_triangle(s):
    return functional.pad(s.ones(torch.int64).tril(), (1, 0), value=1)[:, :-1] == 1


@visible("causal(-1)")
def strictly_before(s):
    return s.j < s.i


@visible("causal & window(3)")
def sliding_window(s):
    return (s.j <= s.i) & (s.j > s.i - 3)


@visible("causal & window(3)")
def band_of_two_triangles(s):
    return s.ones().tril() & s.ones().triu(-2)


@visible("causal & window(3)")
def difference_of_two_triangles(s):
    return s.ones().tril() ^ s.ones().tril(-3)


@visible("causal & window(4)")
def distance_below_a_bound(s):
    distance = s.i - s.j
    return torch.logical_and(distance >= 0, distance.abs() < 4)


@visible("causal(2) & window(5, 2)")
def window_on_both_sides(s):
    return (s.i - s.j).abs() <= 2


@visible("causal(Sk-Sq) & window(3, Sk-Sq)")
def sliding_window_after_a_cache(s):
    i = torch.arange(s.past, s.sk)[:, None]
    return (s.j <= i) & (i - s.j < 3)


@additive("causal & window(2)")
def sum_of_two_triangles(s):
    return torch.triu(s.full(-INF), 1) + torch.tril(s.full(-INF), -2)


@visible("causal & (first(2) | window(3))")
def sinks_and_window(s):
    return (s.j <= s.i) & ((s.j > s.i - 3) | (s.j < 2))


@visible("causal & (first(2) | window(3))")
def sinks_and_window_by_cases(s):
    causal = s.j <= s.i
    return torch.where(s.j < 2, causal, causal & (s.i - s.j < 3))


@visible("causal & (first(2) | window(3))")
def window_with_sinks_written_in_place(s):
    window = s.ones().triu(-2)
    window[:, :2] = True
    return window & s.ones().tril()


@visible("causal | first(3)")
def prefix(s):
    return (s.j <= s.i) | (s.j < 3)


@visible("causal | first(3)")
def prefix_written_in_place(s):
    mask = s.ones(torch.float32).tril()
    mask[..., :3] = 1
    return mask == 1


@additive("causal | first(3)")
def prefix_by_fill_of_a_slice(s):
    mask = s.full(-INF).triu(1)
    mask[:, :3].zero_()
    return mask


@visible("padding")
def keys_that_are_one(s):
    return (s.given == 1)[:, None, None, :].expand(-1, 1, s.sq, -1)


@visible("padding")
def keys_that_are_not_zero(s):
    return s.given[:, None, None, :] != 0


@hidden("padding")
def keys_that_are_zero(s):
    return (s.given == 0).view(s.given.shape[0], 1, 1, s.sk)


@visible("padding")
def keys_as_bool(s):
    return s.given.to(torch.bool).unsqueeze(1).unsqueeze(2)


@hidden("padding")
def keys_not_bool(s):
    return ~s.given.bool()[:, None, None, :]


@visible("causal & padding")
def causal_and_padding(s):
    return (s.j <= s.i) & s.given.bool()[:, None, None, :]


@visible("causal & padding")
def causal_and_padding_over_indices(s):
    b = torch.arange(s.q.shape[0])[:, None, None, None]
    kept = s.given.bool()
    causal = s.j[None, None] <= s.i[None, None]
    return s.q.new_ones((), dtype=torch.bool) & causal & kept[b, s.j[None, None]]


@additive("causal & padding")
def causal_and_padding_added(s):
    padded = torch.zeros(s.given.shape).masked_fill(s.given == 0, -INF)[:, None, None, :]
    return padded + s.full(-INF).triu(1)


@additive("causal & padding")
def one_minus_product(s):
    kept = s.given.bool()[:, None, :] & (s.j <= s.i)
    return (1.0 - kept[:, None].float()) * MIN


@additive("causal & opaque")
def padding_assigned_to_a_slice(s):
    mask = torch.triu(s.full(MIN), 1)[None, None].expand(s.given.shape[0], 1, -1, -1).clone()
    padded = mask[:, :, :, : s.sk] + s.given[:, None, None, :] == 0
    mask[:, :, :, : s.sk] = mask[:, :, :, : s.sk].masked_fill(padded, MIN)
    return mask


@visible("opaque & padding")
def two_paddings(s):
    return (s.given != 0)[:, None, None, :] & (s.ids != 3)[:, None, None, :]


@visible("segments", fits=not_fewer_keys)
def segments(s):
    return s.ids[:, None, : s.sq, None] == s.ids[:, None, None, :]


@visible("causal & segments", fits=not_fewer_keys)
def causal_within_segments(s):
    same = s.ids[:, None, : s.sq, None] == s.ids[:, None, None, :]
    return same & (s.j <= s.i)


@visible("causal | opaque")
def causal_or_given(s):
    return (s.j <= s.i) | s.pairs


@visible("causal & chunk(4) & padding")
def causal_chunks_and_padding(s):
    chunk = (s.j // 4) == (s.i // 4)
    return chunk & (s.j <= s.i) & (s.given > 0)[:, None, None, :]


@visible("chunk(4)")
def blocks_on_the_diagonal(s):
    return torch.div(s.j, 4, rounding_mode="floor") == torch.div(s.i, 4, rounding_mode="floor")


@visible("causal & chunk(4)")
def keys_since_the_chunk_began(s):
    return (s.j <= s.i) & (s.j >= s.i // 4 * 4)


@visible("causal & chunk(4)")
def chunk_that_a_remainder_reaches_back(s):
    return (s.j <= s.i) & (s.i - s.j <= s.i % 4)


@visible("chunk(4)")
def chunk_by_both_of_its_ends(s):
    begin = (s.i // 4) * 4
    return (s.j >= begin) & (s.j < begin + 4)


@visible("until chunk(4)")
def causal_between_blocks(s):
    return s.j // 4 <= s.i // 4


@visible("until chunk(4)")
def keys_until_the_block_ends(s):
    return s.j < (s.i // 4 + 1) * 4


@visible("until chunk(4, j 4)")
def earlier_blocks_only(s):
    return s.j // 4 < s.i // 4


@visible("since chunk(3)")
def later_blocks_too(s):
    return s.i // 3 <= s.j // 3


@visible("causal(Sk-Sq) & chunk(4, i Sk-Sq)")
def chunks_after_a_cache(s):
    i = torch.arange(s.sq)[:, None] + s.past
    return (s.j // 4 == i // 4) & (s.j <= i)


@visible("causal & chunk(4) & window(3)")
def window_within_chunks(s):
    return (s.j <= s.i) & (s.i - s.j < 3) & (s.j // 4 == s.i // 4)


@additive("causal & chunk(4)")
def chunks_added(s):
    return torch.where((s.j // 4 == s.i // 4) & (s.j <= s.i), torch.zeros(()), MIN)[None, None]


@visible("chunk(4) & padding")
def chunks_and_padding(s):
    return (s.j // 4 == s.i // 4) & (s.given > 0)[:, None, None, :]


@visible("opaque")
def chunks_of_different_sizes(s):
    return s.j // 4 == s.i // 3


@visible("opaque")
def every_other_block(s):
    return s.j // 4 == s.i // 4 * 2


@visible("causal & segments", fits=as_many_keys)
def chunks_counted_from_left_padding(s):
    padding = (s.given > 0).sum(-1)[:, None, None]
    return (((s.j - padding) // 4 == (s.i - padding) // 4) & (s.j <= s.i))[:, None]


@hidden("segments", fits=as_many_keys)
def other_segments(s):
    return s.ids[:, None, :, None] != s.ids[:, None, None, :]


@visible("opaque", fits=as_many_keys)
def only_other_segments(s):
    return s.ids[:, None, :, None] != s.ids[:, None, None, :]


@visible("causal & segments", fits=as_many_keys)
def segments_by_running_count_over_indices(s):
    number = (s.ids == 0).cumsum(-1)
    b = torch.arange(s.q.shape[0])[:, None, None, None]
    return (number[b, s.i[None, None]] == number[b, s.j[None, None]]) & (s.j <= s.i)


@visible("opaque & segments", fits=as_many_keys)
def segments_of_two_kinds_of_numbers(s):
    same = s.ids[:, :, None] == s.ids[:, None, :]
    return (same & (s.ids[:, :, None] <= s.given[:, None, :]))[:, None]


@visible("segments & segments", fits=as_many_keys)
def segments_within_segments(s):
    outer = s.ids[:, :, None] // 2 == s.ids[:, None, :] // 2
    return (outer & (s.given[:, :, None] == s.given[:, None, :]))[:, None]


@visible("opaque", fits=as_many_keys)
def rounded_segments(s):
    ids = s.ids.to(torch.bfloat16)
    return ids[:, None, :, None] == ids[:, None, None, :]


def packed(s, step=1):
    before = s.ids[:, :1] - 1
    return (torch.diff(s.ids, prepend=before, dim=-1) != step).cumsum(-1)


def in_one_run(s, step=1):
    number = packed(s, step)
    return number[:, None, :, None] == number[:, None, None, :]


@visible("causal & segments", fits=as_many_keys)
def order_of_positions_in_runs(s):
    return in_one_run(s) & (s.ids[:, None, None, :] <= s.ids[:, None, :, None])


@visible("causal & segments & window(3)", fits=as_many_keys)
def window_of_positions_in_runs(s):
    key, query = s.ids[:, None, None, :], s.ids[:, None, :, None]
    return in_one_run(s) & (key <= query) & (key > query - 3)


@visible("causal(-1) & segments", fits=as_many_keys)
def earlier_positions_in_runs(s):
    return (s.ids[:, None, :, None] > s.ids[:, None, None, :]) & in_one_run(s)


@visible("opaque & segments", fits=as_many_keys)
def order_of_positions_in_other_runs(s):
    return in_one_run(s, step=2) & (s.ids[:, None, None, :] <= s.ids[:, None, :, None])


@visible("opaque & segments", fits=as_many_keys)
def order_of_other_numbers_in_runs(s):
    return in_one_run(s) & (s.given[:, None, None, :] <= s.given[:, None, :, None])


@visible("causal | padding")
def prefix_that_data_tell(s):
    return (s.j <= s.i) | (s.given == 1)[:, None, None, :]


@visible("causal | (opaque & segments)", fits=as_many_keys)
def causal_but_for_images(s):
    b = torch.arange(s.q.shape[0])[:, None, None, None]
    image_of_query, image_of_key = s.ids[b, s.i[None, None]], s.ids[b, s.j[None, None]]
    return (s.j <= s.i) | ((image_of_query == image_of_key) & (image_of_query >= 1))


@visible("(causal | padding) & padding")
def padded_prefix_that_data_tell(s):
    return ((s.j <= s.i) | (s.ids == 1)[:, None, None, :]) & (s.given > 0)[:, None, None, :]


@hidden("opaque", fits=as_many_keys)
def triangle_in_a_buffer(s):
    return s.table[:, :, : s.sq, : s.sk] == 0


@visible("opaque", fits=as_many_keys)
def rows_of_a_buffer(s):
    return s.table[:, :, : s.sq, : s.sk]


@visible("opaque")
def twice_the_query(s):
    return s.j <= s.i * 2


@visible("opaque")
def every_other_distance(s):
    return (s.i - s.j) % 2 == 0


@visible("causal & opaque")
def dilated(s):
    return ((s.i - s.j) % 2 == 0) & (s.j <= s.i)


@visible("padding")
def late_keys(s):
    return (s.j >= 3) & s.ones()


@visible("opaque")
def bfloat16_positions(s):
    return s.i.to(torch.bfloat16) * 100 >= s.j.to(torch.bfloat16) * 100


@visible("opaque")
def product_of_positions(s):
    return s.i * s.j < 9


@visible("opaque")
def written_through_an_index(s):
    mask = s.ones().tril()
    return torch.index_put(mask, (torch.zeros((), dtype=torch.int64),), torch.ones((), dtype=torch.bool))


@additive("none")
def fill_that_still_weighs(s):
    return s.full(-1e4).triu(1)


@additive("none")
def two_fills(s):
    return torch.triu(s.full(-1e9), 1) + torch.tril(s.full(-1e9), 1)


@additive("none")
def slopes(s):
    return (s.j - s.i) * 0.5


@additive("none")
def complement_of_counts(s):
    return (1.0 - s.given[:, None, None, :].float()) * MIN


@additive("none")
def zero_times_infinity(s):
    return (1.0 - s.ones(torch.float32).tril()) * -INF


@additive("none")
def positive_fill(s):
    return s.full(1e9).triu(1)


@visible("causal")
def through_merged_heads(s):
    """One mask for batch times heads, taken apart again."""
    causal = (s.j <= s.i).expand(2, 3, s.sq, s.sk)
    return causal.reshape(6, s.sq, s.sk).view(2, 3, s.sq, s.sk)
