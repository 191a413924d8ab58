"""The forward of causal linear attention on Triton: one sweep over q, k, v."""

from torch import Tensor

from attnopt.kernels._triton import bind_context
from attnopt.kernels.lightning.triton_decay import prepare_decay
from attnopt.kernels.lightning.triton_launch import entering_states, prepare_sweep, run_sweep
from attnopt.kernels.lightning.triton_tiles import Tiles, chunk_rows


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    starts: Tensor | None = None,
    *,
    with_state: bool = True,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention and the state after the last token; shapes as in `chunked.forward`, no dimension 0.

    Without `with_state` the state is empty.

    q, k, v fp32, bf16 or fp16 with D and Dv <= 256, any strides. `starts`: of packed sequences, the
    op's `cu_seqlens`. `tiles` overrides the choice by shape.
    """
    bind_context(q)
    chunk = tiles.chunk if tiles else chunk_rows(q.shape[2], max(q.shape[3], v.shape[3]), q.dtype)
    decay = prepare_decay(log_decay, chunk, starts)
    sweep = prepare_sweep(q, k, v, decay=decay, scale=scale, reverse=False, tiles=tiles, starts=starts)
    swept = run_sweep(sweep, entering_states(sweep, initial_state), q.dtype, with_state=with_state)
    return swept.out, swept.state
