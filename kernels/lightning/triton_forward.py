"""The forward of causal linear attention on Triton: one sweep over q, k, v."""

from torch import Tensor

from attnopt.kernels.lightning.triton_sweep import Tiles, choose_tiles, prepare_decay, processors_of, sweep


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
    heads, length = q.shape[0] * q.shape[1], q.shape[2]
    tiles = tiles or choose_tiles(heads, length, q.shape[3], v.shape[3], q.dtype, processors_of(q))
    decay = prepare_decay(log_decay, tiles.chunk)
    swept = sweep(
        q, k, v, decay=decay, scale=scale, reverse=False, entering=initial_state, out_dtype=q.dtype, tiles=tiles
    )
    return swept.out, swept.state
