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
#: Queries of one piece of work; keys of a tile in the forward, and in the backward, where more is on chip.
BLOCK, FORWARD_KEYS, BACKWARD_KEYS = 128, 128, 64
NARROW = 16
STAGES = 2
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
        attend_kernel,
    )  # Gluon, only where it is served

    q, k, v = problem.q, problem.k, problem.v
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse, log_sum = (q.new_empty(q.shape[:3], dtype=torch.float32) for _ in range(2))
    bind_context(q)
    with on_device_of(q):
        attend_kernel[(_programs(problem),)](
            _rows(q, BLOCK // 2), _rows(k, FORWARD_KEYS), _rows(v, FORWARD_KEYS), _rows(k, NARROW), _rows(v, NARROW),
            _rows(o, BLOCK // 2), lse, log_sum,
            *_share(problem), *_edges(problem), problem.scale * LOG2E.value, problem.scale,
            STAGES=STAGES, WINDOWED=problem.reach.windowed, HEAD=_head(problem),
            EMPTY_IS_ZERO=problem.empty_row == "zero", num_warps=4,
        )  # fmt: skip
    return Answer(fill_empty_rows(problem, o, lse) if problem.returns_the_mean else o, lse, log_sum)


def queries(problem: Problem, do: Tensor, delta: Tensor, tail: Tensor) -> Tensor:
    """dq (B, H, Sq, D); delta and tail (B, H, Sq) fp32 contiguous, as `triton_backward.Rows` has them."""
    from attnopt.kernels.streaming.triton_hopper_queries import queries_kernel

    q, k, v = problem.q, problem.k, problem.v
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    bind_context(q)
    with on_device_of(q):
        queries_kernel[(_programs(problem),)](
            *(_rows(x, BLOCK // 2) for x in (q, do)), *(_rows(x, BACKWARD_KEYS) for x in (k, v)),
            *(_rows(x, NARROW) for x in (k, v)), _rows(dq, BLOCK // 2), delta, tail,
            *_share(problem), *_edges(problem), problem.scale * LOG2E.value, problem.scale,
            STAGES=STAGES, WINDOWED=problem.reach.windowed, HEAD=_head(problem), num_warps=4,
        )  # fmt: skip
    return dq


def is_bulk(x: Tensor) -> bool:
    """Whether TMA can load blocks of `x` (B, H, S, D): adjacent channels, other strides and start at 16 bytes."""
    sizes = [step * x.element_size() for step in x.stride()[:3]]
    return x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(size > 0 and size % 16 == 0 for size in sizes)


def _release() -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", triton.__version__)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _share(problem: Problem) -> tuple[int, int, int, int]:
    """works, blocks, heads, group."""
    batch, heads, rows, _ = problem.q.shape
    blocks = triton.cdiv(rows, BLOCK)
    return batch * heads * blocks, blocks, heads, problem.group


def _programs(problem: Problem) -> int:
    """One for each multiprocessor: shared memory holds no second."""
    return min(_share(problem)[0], _processors(problem.q))


def _processors(x: Tensor) -> int:
    return int(torch.cuda.get_device_properties(x.device).multi_processor_count)


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
