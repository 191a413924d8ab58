"""Triton backward: gradients by block of keys, then by block of queries, each summed inside one program: no atomics.

FlashAttention-2 (arXiv 2307.08691, algorithm 2) split in two, with the tiles that nobody sees left out.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from attnopt.kernels._triton import next_power_of_two, on_device_of
from attnopt.kernels.streaming import triton_hopper
from attnopt.kernels.streaming.problem import (
    Answer,
    Gradients,
    Problem,
    add_mean_gradient,
    sink_gradient,
)
from attnopt.kernels.streaming.triton_hopper import is_bulk, serves
from attnopt.kernels.streaming.triton_keys import far_kernel, keys_kernel
from attnopt.kernels.streaming.triton_queries import prepare_kernel, queries_kernel
from attnopt.kernels.streaming.triton_tiles import (
    BY_KEYS,
    BY_QUERIES,
    Tiles,
    padded,
    scalars,
    strides,
    tiles_for,
)

#: Queries beyond the window that one program sums for the sink columns, and the most such programs for a head.
FAR_ROWS, MOST_PARTS = 1024, 32
#: Tiles of those programs beside the keys' kernel for Hopper, whose blocks have as many keys.
FAR_TILES = Tiles(64, triton_hopper.BLOCK, 4, 2)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """One number per query, fp32 (B, H, Sq): weights are exp2(unit * (x - peak) - tail), or without peak if PLAIN."""

    delta: Tensor
    peak: Tensor
    tail: Tensor


def launch(
    problem: Problem,
    answer: Answer,
    do: Tensor,
    dlse: Tensor | None,
    by_keys: Tiles | None = None,
    by_queries: Tiles | None = None,
) -> Gradients:
    """Gradients of q, k, v and the sink logits (none of the bias); no dimension may be empty."""
    q, v = problem.q, problem.v
    upstream = _live(problem, answer, do)
    on_hopper = by_keys is None and by_queries is None and serves(problem) and is_bulk(upstream)
    with on_device_of(q):
        makes_rows = on_hopper and dlse is None
        rows = unknown(answer) if makes_rows else prepare(problem, answer, upstream, dlse)
        common = common_arguments(problem, upstream, rows)
        if on_hopper:
            dq, near = triton_hopper.queries(
                problem, upstream, rows.delta, rows.tail, answer if makes_rows else None
            )
        else:
            dq, near = queries(problem, common, by_queries or tiles_for(problem, BY_QUERIES)), None
        if on_hopper and triton_hopper.serves_keys(problem):
            dk, dv = keys_on_hopper(problem, common, upstream, rows, near)
        else:
            dk, dv = keys(problem, common, by_keys or tiles_for(problem, BY_KEYS))
    return Gradients(
        dq,
        dk,
        add_mean_gradient(problem, answer, do, dv).to(v.dtype),
        None,
        sink_gradient(problem, answer, rows.delta),
    )


def _live(problem: Problem, answer: Answer, do: Tensor) -> Tensor:
    """`do` without what arrives at empty rows, which would make 0 * NaN of a NaN there."""
    return do.masked_fill(torch.isneginf(answer.lse)[..., None], 0.0) if problem.may_leave_rows_empty else do


def common_arguments(problem: Problem, do: Tensor, rows: Rows) -> dict[str, Any]:
    """What both kernels take, by the names of their parameters."""
    q, k, v = problem.q, problem.k, problem.v
    pointers = {"q_ptr": q, "k_ptr": k, "v_ptr": v, "do_ptr": do}
    statistics = {"delta_ptr": rows.delta, "peak_ptr": rows.peak, "tail_ptr": rows.tail}
    sizes = {"heads": q.shape[1], "group": problem.group, "D": q.shape[3], "DV": v.shape[3]}
    widths = {"D_PAD": padded(q.shape[3]), "DV_PAD": padded(v.shape[3])}
    steps = strides("q", q) | strides("k", k) | strides("v", v) | strides("do", do)
    return pointers | statistics | sizes | widths | steps | scalars(problem)


def unknown(answer: Answer) -> Rows:
    """Rows that `triton_hopper.queries` fills; weights are plain there, and nobody reads a peak."""
    delta, tail = (torch.empty_like(answer.lse, memory_format=torch.contiguous_format) for _ in range(2))
    return Rows(delta, delta, tail)


def prepare(problem: Problem, answer: Answer, do: Tensor, dlse: Tensor | None) -> Rows:
    """delta, peak and tail of every query."""
    batch, heads, n_rows, dv = do.shape
    rows = Rows(*(torch.empty_like(answer.lse, memory_format=torch.contiguous_format) for _ in range(3)))
    prepare_kernel[(batch * heads * triton.cdiv(n_rows, 64),)](
        answer.o,
        do,
        answer.lse.contiguous(),
        answer.log_sum.contiguous(),
        answer.lse if dlse is None else dlse.contiguous(),
        rows.delta,
        rows.peak,
        rows.tail,
        *answer.o.stride(),
        *do.stride(),
        heads,
        n_rows,
        PLAIN=scalars(problem)["PLAIN"],
        DLSE=dlse is not None,
        DV=dv,
        DV_PAD=padded(dv),
        BLOCK=64,
    )
    return rows


def keys(problem: Problem, common: dict[str, Any], tiles: Tiles) -> tuple[Tensor, Tensor]:
    """dk and dv, (B, Hkv, Sk, .)."""
    k, v = problem.k, problem.v
    batch, kv_heads, columns, _ = k.shape
    far_dk, far_dv = far_sinks(problem, common, tiles)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    keys_kernel[(batch * kv_heads * triton.cdiv(columns, tiles.keys),)](
        **common,
        dk_ptr=dk,
        dv_ptr=dv,
        far_dk_ptr=far_dk,
        far_dv_ptr=far_dv,
        parts=far_dk.shape[1],
        factor=abs(problem.scale),
        BLOCK_Q=tiles.queries,
        BLOCK_K=tiles.keys,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return dk, dv


def keys_on_hopper(
    problem: Problem, common: dict[str, Any], do: Tensor, rows: Rows, near: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """dk and dv, (B, Hkv, Sk, D), of a problem that `triton_hopper.serves_keys`; `near` by `triton_hopper.queries`."""
    sums = near or far_sinks(problem, common, FAR_TILES)
    done = problem.reach.head if near else 0
    return triton_hopper.keys(problem, do, rows.delta, rows.tail, sums, done)


def far_sinks(problem: Problem, common: dict[str, Any], tiles: Tiles) -> tuple[Tensor, Tensor]:
    """What queries beyond the window add to dk and dv of the sinks: fp32 (B * Hkv, parts, sinks, .)."""
    where, (batch, kv_heads, columns, d), dv = problem.reach, problem.k.shape, problem.v.shape[3]
    far_rows = where.rows - max(0, min(tiles.keys, columns) - 1 - where.lower)
    sinks = where.sinks if where.windowed and far_rows > 0 else 0
    parts = min(MOST_PARTS, triton.cdiv(far_rows, FAR_ROWS)) if sinks else 0
    far_dk, far_dv = (
        problem.k.new_empty((batch * kv_heads, parts, sinks, n), dtype=torch.float32) for n in (d, dv)
    )
    if sinks:
        width = min(tiles.keys, next_power_of_two(sinks))
        far_kernel[(batch * kv_heads * parts * triton.cdiv(sinks, width),)](
            **common,
            dk_ptr=far_dk,
            dv_ptr=far_dv,
            parts=parts,
            BLOCK_Q=tiles.queries,
            BLOCK_K=tiles.keys,
            BLOCK_SINK=width,
            num_warps=4,
            num_stages=tiles.stages,
        )
    return far_dk, far_dv


def queries(problem: Problem, common: dict[str, Any], tiles: Tiles) -> Tensor:
    """dq, (B, H, Sq, D)."""
    q, head = problem.q, problem.reach.head
    batch, heads, n_rows, _ = q.shape
    dq = q.new_empty(q.shape)
    queries_kernel[(batch * heads * triton.cdiv(n_rows, tiles.queries),)](
        **common,
        dq_ptr=dq,
        factor=problem.scale,
        HEAD=head > 0,
        BLOCK_Q=tiles.queries,
        BLOCK_K=tiles.keys,
        BLOCK_HEAD=min(tiles.keys, next_power_of_two(head)),
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return dq
