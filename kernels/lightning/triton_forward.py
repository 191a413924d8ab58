"""The forward of causal linear attention on Triton: one sweep over q, k, v."""

from torch import Tensor

from attnopt.kernels.lightning.triton_sweep import prepare_decay, sweep
from attnopt.kernels.lightning.triton_tiles import Tiles, chunk_rows


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention and the state after the last token; shapes as in `chunked.forward`, no dimension 0.

    q, k, v fp32, bf16 or fp16 with D and Dv <= 256, any strides. `tiles` overrides the choice by shape.
    """
    chunk = tiles.chunk if tiles else chunk_rows(q.shape[2], max(q.shape[3], v.shape[3]), q.dtype)
    swept = sweep(
        q, k, v,
        decay=prepare_decay(log_decay, chunk), scale=scale, reverse=False, entering=initial_state,
        out_dtype=q.dtype, tiles=tiles,
    )  # fmt: skip
    return swept.out, swept.state
