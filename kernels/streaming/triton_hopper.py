"""Where the Hopper kernels serve, and their launches: plain structured attention in half precision."""

import re
from typing import Any

import torch
import triton
from torch import Tensor

from attnopt.kernels._triton import INTERPRETED, bind_context, on_device_of
from attnopt.kernels.streaming.problem import Answer, Problem, fill_empty_rows
from attnopt.kernels.streaming.triton_tiles import LOG2E

#: Triton releases whose Gluon, a language still in development, these kernels were compiled with and measured.
GLUON = {(3, 6), (3, 7)}
#: Queries, or keys, of one piece of work; keys of a tile in the forward, and in the backward, where more is on chip.
BLOCK, FORWARD_KEYS, BACKWARD_KEYS, BACKWARD_QUERIES = 128, 128, 64, 64
NARROW = 16
STAGES = 2
#: Pieces of work whose rows are on chip: with two, the next one's arrive during this one. In the forward that pays
#: where queries see few keys, up to SHORT: 0.574 to 0.541 ms with 1,024 of 16,384, and 1.669 to 1.702 with 4,096.
SHORT, QUERIES_SETS = 2048, 2
#: Of `keys`, with 1,024 of 16,384: 1.054 ms with 3 stages and 2 sets, 1.067 with 3 and 1, 1.081 with 2 and 1.
KEYS_STAGES, KEYS_SETS = 3, 2
#: Numbers that a query has in `keys`, tail and delta, come by TMA, which wants lines of 16 bytes: Sq a multiple of 4.
LINE = 4
WIDTHS = (64, 128)


def serves(problem: Problem) -> bool:
    """Whether these kernels compute the problem: on Hopper, bf16 or fp16, D = Dv of 64 or 128, nothing but structure.

    The scale is positive; channels are adjacent, other strides multiples of 16 bytes, as TMA wants them.
    """
    q, k, v = problem.q, problem.k, problem.v
    extras = (
        problem.bias,
        problem.mask,
        problem.key_padding,
        problem.sink_logits,
        problem.softcap,
        problem.slopes,
    )
    return (
        q.is_cuda
        and not INTERPRETED
        and torch.cuda.get_device_capability(q.device)[0] == 9
        and _release() in GLUON
        and q.dtype in {torch.bfloat16, torch.float16}
        and q.shape[3] == v.shape[3]
        and q.shape[3] in WIDTHS
        and problem.scale > 0
        and all(extra is None for extra in extras)
        and all(is_bulk(x) for x in (q, k, v))
    )


def launch(problem: Problem) -> Answer:
    """The attention of a problem that `serves` takes; no dimension may be empty."""
    from attnopt.kernels.streaming.triton_hopper_forward import (
        attend_kernel,  # Gluon, only where it is served
    )

    q, k, v = problem.q, problem.k, problem.v
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse, log_sum = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    bind_context(q)
    with on_device_of(q):
        attend_kernel[(_programs(problem),)](
            _rows(q, BLOCK // 2), _rows(k, FORWARD_KEYS), _rows(v, FORWARD_KEYS), _rows(k, NARROW), _rows(v, NARROW),
            _rows(o, BLOCK // 2), lse, log_sum,
            *_share(problem), *_edges(problem), problem.scale * LOG2E.value, problem.scale,
            STAGES=STAGES, SETS=_sets(problem), WINDOWED=problem.reach.windowed, HEAD=_head(problem),
            EMPTY_IS_ZERO=problem.empty_row == "zero", num_warps=4,
        )  # fmt: skip
    return Answer(fill_empty_rows(problem, o, lse) if problem.returns_the_mean else o, lse, log_sum)


def queries(
    problem: Problem, do: Tensor, delta: Tensor, tail: Tensor, answer: Answer | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """dq (B, H, Sq, D); delta and tail (B, H, Sq) fp32 contiguous, as `triton_backward.Rows` has them.

    With the forward's `answer` these two are results, made on the way. Where the head has a narrow tile, also what all
    queries send to the head's: dk / scale and dv, fp32 (B * Hkv, 1, head, D) each.
    """
    from attnopt.kernels.streaming.triton_hopper_queries import queries_kernel

    q, k, v = problem.q, problem.k, problem.v
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    works, head, sums = _share(problem)[0], _head(problem), _sums(problem)
    columns = problem.reach.head if sums else 0
    near = q.new_empty((2, works * 2, columns, q.shape[3]), dtype=torch.float32)
    o, lse = (do, delta) if answer is None else (answer.o.contiguous(), answer.lse.contiguous())
    if answer is not None:  # else a launch before this one has done it
        bind_context(q)
    with on_device_of(q):
        queries_kernel[(_programs(problem),)](
            *(_rows(x, BLOCK // 2) for x in (q, do)), *(_rows(x, BACKWARD_KEYS) for x in (k, v)),
            *(_rows(x, NARROW) for x in (k, v)), _rows(dq, BLOCK // 2), delta, tail, o, lse, *near,
            *_share(problem), *_edges(problem), problem.scale * LOG2E.value, problem.scale,
            STAGES=STAGES, SETS=QUERIES_SETS, WINDOWED=problem.reach.windowed, HEAD=head, SUMS=sums,
            ROWS_KNOWN=answer is None, num_warps=4,
        )  # fmt: skip
    if not columns:
        return dq, None
    dk, dv = near.view(2, q.shape[0] * k.shape[1], -1, columns, q.shape[3]).sum(2, keepdim=True)
    return dq, (dk, dv)


def serves_keys(problem: Problem) -> bool:
    """Whether `keys` computes a problem that `serves` takes."""
    return problem.q.shape[2] % LINE == 0


def keys(
    problem: Problem,
    do: Tensor,
    delta: Tensor,
    tail: Tensor,
    sums: tuple[Tensor, Tensor],
    done: int = 0,
) -> tuple[Tensor, Tensor]:
    """dk and dv (B, Hkv, Sk, D), where `serves_keys`, after `queries`; delta and tail as for it.

    sums: dk / scale and dv of the first keys, fp32 (B * Hkv, parts, keys, D) each: all that the first `done` get, as
    from `queries`; or, with done 0, what queries beyond the window of BLOCK keys send to the sinks.
    """
    from attnopt.kernels.streaming.triton_hopper_keys import keys_kernel

    q, k, v = problem.q, problem.k, problem.v
    batch, kv_heads, columns, _ = k.shape
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    blocks = triton.cdiv(columns, BLOCK)
    works = batch * kv_heads * blocks
    share = (works, blocks, _light(problem, blocks, by_keys=True), kv_heads, problem.group)
    edges = (*_edges(problem)[:4], 0, 0) if done else _edges(problem)
    with on_device_of(q):
        keys_kernel[(min(works, _processors(q)),)](
            *(_rows(x, BACKWARD_QUERIES) for x in (q, do)), *(_rows(x, BLOCK // 2) for x in (k, v, dk, dv)),
            *(_numbers(x, BACKWARD_QUERIES) for x in (tail, delta)), *sums,
            *share, *edges, *sums[0].shape[1:3], done,
            problem.scale * LOG2E.value, problem.scale,
            STAGES=KEYS_STAGES, SETS=KEYS_SETS, WINDOWED=problem.reach.windowed, num_warps=4,
        )  # fmt: skip
    return dk, dv


def is_bulk(x: Tensor) -> bool:
    """Whether TMA can load blocks of `x` (B, H, S, D): adjacent channels, other strides and start at 16 bytes."""
    sizes = [step * x.element_size() for step in x.stride()[:3]]
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(size > 0 and size % 16 == 0 for size in sizes)


def _release() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _share(problem: Problem) -> tuple[int, int, int, int, int]:
    """works, blocks, light, heads, group."""
    batch, heads, rows, _ = problem.q.shape
    blocks = triton.cdiv(rows, BLOCK)
    return batch * heads * blocks, blocks, _light(problem, blocks, by_keys=False), heads, problem.group


def _light(problem: Problem, blocks: int, *, by_keys: bool) -> int:
    """How many of the blocks of queries, or keys, have less to do than the others, for the window ends in them.

    They are done last, so that all programs end at once: with 4,096 pieces of work for 132 programs, one after another,
    some had 4 % more than their part.
    """
    where = problem.reach
    rows = where.columns - where.rows - where.lower if by_keys else -where.lower
    return min(blocks, triton.cdiv(max(0, rows), BLOCK)) if where.windowed else 0


def _programs(problem: Problem) -> int:
    """One for each multiprocessor: shared memory holds no second."""
    return min(_share(problem)[0], _processors(problem.q))


def _processors(x: Tensor) -> int:
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


def _sets(problem: Problem) -> int:
    where = problem.reach
    return 2 if where.windowed and where.upper - where.lower + where.head <= SHORT else 1


def _sums(problem: Problem) -> bool:
    return serves_keys(problem) and _head(problem) == "narrow"


def _edges(problem: Problem) -> tuple[int, int, int, int, int, int]:
    where = problem.reach
    sinks = where.sinks if where.windowed else 0
    return where.rows, where.columns, where.upper, where.lower, sinks, where.prefix


def _head(problem: Problem) -> str:
    columns = problem.reach.head
    return "none" if columns == 0 else "narrow" if columns <= NARROW else "tiles"


def _rows(x: Tensor, rows: int) -> Any:
    """A descriptor of (B, H, S, D) whose blocks are `rows` rows of one head."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, rows, x.shape[3]], layout)


def _numbers(x: Tensor, block: int) -> Any:
    """A descriptor of (B, H, S) fp32 contiguous, as (B * H, S): its blocks are a number for each query of a tile."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    lines = x.view(-1, x.shape[2])
    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(lines, list(lines.shape), list(lines.stride()), [1, block], layout)
