"""SparQ's last launches in one, where there are few groups: the program that chooses a group's positions attends.

With shared keys it may weigh positions before: all programs of a group do, and the last of them, which it knows by a
ticket, goes on alone. The ticket is a whole number, so whichever program draws the last one computes the same bits.
"""

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from attnopt.kernels._triton import await_launch
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import Tiles, ordered
from attnopt.kernels.sparq.triton_attend import Rest, attend_part, numbers, pointers, sizes, strides
from attnopt.kernels.sparq.triton_score import Scores, as_bytes, new_weights, weigh
from attnopt.kernels.sparq.triton_select import Choice, Weights, select_positions
from attnopt.kernels.sparq.triton_start import strides_of

#: What a thread may hold where positions are weighed as well, so that two programs run beside each other.
REGISTERS = 128


def choose_and_attend(request: Request, scores: Scores | None, weights: Weights, tiles: Tiles) -> Tensor:
    """(B, H, 1, Dv): launches one program per group. Needs `is_joinable`."""
    choice, out = Choice.of(request, weights, tiles), request.output()
    rest = Rest.of(request, choice.out, scores)
    _choose_attend[(len(weights.weight),)](
        *_arguments(request, rest, weights, choice, out),
        **choice.sizes, **sizes(request, rest, tiles), **ordered(early=tiles.early), num_warps=choice.warps,
    )  # fmt: skip
    return out


def weigh_and_attend(request: Request, scores: Scores, tiles: Tiles) -> Tensor:
    """(B, H, 1, Dv): launches (groups, tiles). Needs `is_ticketed`."""
    groups, _, sk = scores.logits.shape
    weights, out = new_weights(request, tiles), request.output()
    weights = replace(weights, weight=scores.logits.new_empty(groups, sk))
    choice, splits = Choice.of(request, weights, tiles), scores.part_max.shape[1]
    rest = Rest.of(request, choice.out, scores)
    _weigh_attend[(groups, triton.cdiv(sk, tiles.weight_block))](
        *_arguments(request, rest, weights, choice, out),
        scores.logits, scores.part_max, scores.part_sum, as_bytes(request.kept), scores.ticket,
        *strides_of(request.kept, 2), splits,
        **choice.sizes, **sizes(request, rest, tiles), **ordered(early=tiles.early),
        WEIGHT_HEADS=triton.next_power_of_2(request.group), WEIGHT_SPLITS=triton.next_power_of_2(splits),
        WEIGHT_BLOCK=tiles.weight_block, num_warps=min(8, choice.warps), maxnreg=REGISTERS,
    )  # fmt: skip
    return out


def _arguments(
    request: Request, rest: Rest, weights: Weights, choice: Choice, out: Tensor
) -> tuple[Tensor | float | None, ...]:
    return (
        *choice.pointers(request, weights), *pointers(request, rest, out), *strides(request, rest),
        *numbers(request, rest), *choice.numbers(request, weights)[2:],
    )  # fmt: skip


@triton.jit
def _end(
    weight_ptr, best_ptr, starts_ptr, lengths_ptr, local_ptr, runs_ptr, narrow_ptr, positions_ptr, there_ptr,
    q_ptr, k_ptr, v_ptr, logits_ptr, max_ptr, sum_ptr, mean_ptr, known_ptr, out_ptr,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, mean_sb, mean_sh, mean_sd,
    pid, kv_heads, group, d, dv, sk, splits, scale, runs, topk, local, grown,
    RUNS_PAD: tl.constexpr, K_PAD: tl.constexpr, RUN: tl.constexpr, NARROW: tl.constexpr,
    G_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLEND: tl.constexpr, D_PAD: tl.constexpr, CHUNK: tl.constexpr,
    SPLITS_PAD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Chooses the positions of group `pid` and attends to them."""
    select_positions(
        weight_ptr, best_ptr, starts_ptr, lengths_ptr, local_ptr, runs_ptr, narrow_ptr, positions_ptr, there_ptr,
        pid, kv_heads, sk, runs, topk, local, grown, RUNS_PAD, K_PAD, RUN, NARROW,
    )  # fmt: skip
    tl.debug_barrier()  # what other threads of this program stored is read next
    attend_part(
        q_ptr, k_ptr, v_ptr, logits_ptr, max_ptr, sum_ptr, mean_ptr, known_ptr, out_ptr,
        None, positions_ptr, starts_ptr, lengths_ptr, None, None, None, None,
        q_sb, q_sh, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, mean_sb, mean_sh, mean_sd, 0, 0,
        pid, 0, 1, kv_heads, group, d, dv, sk, splits, scale, topk, topk, grown,
        HAS_POSITIONS=True, IS_WHOLE=True, G_PAD=G_PAD, DV_PAD=DV_PAD, BLEND=BLEND, D_PAD=D_PAD, CHUNK=CHUNK,
        SPLITS_PAD=SPLITS_PAD, BLOCK=BLOCK, PRECISION=PRECISION,
    )  # fmt: skip


@triton.jit
def _choose_attend(
    weight_ptr, best_ptr, starts_ptr, lengths_ptr, local_ptr, runs_ptr, narrow_ptr, positions_ptr, there_ptr,
    q_ptr, k_ptr, v_ptr, logits_ptr, max_ptr, sum_ptr, mean_ptr, known_ptr, out_ptr,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, mean_sb, mean_sh, mean_sd,
    kv_heads, group, d, dv, sk, splits, scale, runs, topk, local, grown,
    RUNS_PAD: tl.constexpr, K_PAD: tl.constexpr, RUN: tl.constexpr, NARROW: tl.constexpr,
    G_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLEND: tl.constexpr, D_PAD: tl.constexpr, CHUNK: tl.constexpr,
    SPLITS_PAD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Program p: the end of group p."""
    await_launch(EARLY)
    pid = tl.program_id(0)
    _end(
        weight_ptr, best_ptr, starts_ptr, lengths_ptr, local_ptr, runs_ptr, narrow_ptr, positions_ptr, there_ptr,
        q_ptr, k_ptr, v_ptr, logits_ptr, max_ptr, sum_ptr, mean_ptr, known_ptr, out_ptr,
        q_sb, q_sh, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, mean_sb, mean_sh, mean_sd,
        pid, kv_heads, group, d, dv, sk, splits, scale, runs, topk, local, grown,
        RUNS_PAD, K_PAD, RUN, NARROW, G_PAD, DV_PAD, BLEND, D_PAD, CHUNK, SPLITS_PAD, BLOCK, PRECISION,
    )  # fmt: skip


@triton.jit
def _weigh_attend(
    weight_ptr, best_ptr, starts_ptr, lengths_ptr, local_ptr, runs_ptr, narrow_ptr, positions_ptr, there_ptr,
    q_ptr, k_ptr, v_ptr, logits_ptr, max_ptr, sum_ptr, mean_ptr, known_ptr, out_ptr,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, mean_sb, mean_sh, mean_sd,
    kv_heads, group, d, dv, sk, splits, scale, runs, topk, local, grown,
    scored_ptr, scored_max_ptr, scored_sum_ptr, kept_ptr, ticket_ptr, kept_sb, kept_sn, parts,
    RUNS_PAD: tl.constexpr, K_PAD: tl.constexpr, RUN: tl.constexpr, NARROW: tl.constexpr,
    G_PAD: tl.constexpr, DV_PAD: tl.constexpr, BLEND: tl.constexpr, D_PAD: tl.constexpr, CHUNK: tl.constexpr,
    SPLITS_PAD: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr, EARLY: tl.constexpr,
    WEIGHT_HEADS: tl.constexpr, WEIGHT_SPLITS: tl.constexpr, WEIGHT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (p, j): weights of one tile of positions of group p, and after all of these its end."""
    await_launch(EARLY)
    pid = tl.program_id(0)
    weigh(
        scored_ptr, scored_max_ptr, scored_sum_ptr, kept_ptr, starts_ptr, lengths_ptr, local_ptr, weight_ptr, best_ptr,
        kept_sb, kept_sn, pid, tl.program_id(1),
        kv_heads, group, sk, runs, parts, local, grown, WEIGHT_HEADS, WEIGHT_SPLITS, WEIGHT_BLOCK, RUN,
    )  # fmt: skip
    # All threads have stored before the ticket is drawn; who draws the last one sees what all have stored.
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr + pid, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        _end(
            weight_ptr, best_ptr, starts_ptr, lengths_ptr, local_ptr, runs_ptr, narrow_ptr, positions_ptr, there_ptr,
            q_ptr, k_ptr, v_ptr, logits_ptr, max_ptr, sum_ptr, mean_ptr, known_ptr, out_ptr,
            q_sb, q_sh, q_sd, k_sb, k_sh, k_sn, k_sd, v_sb, v_sh, v_sn, v_sd, mean_sb, mean_sh, mean_sd,
            pid, kv_heads, group, d, dv, sk, splits, scale, runs, topk, local, grown,
            RUNS_PAD, K_PAD, RUN, NARROW, G_PAD, DV_PAD, BLEND, D_PAD, CHUNK, SPLITS_PAD, BLOCK, PRECISION,
        )  # fmt: skip
