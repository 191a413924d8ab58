"""SparQ decoding in Triton, in four launches (one more where heads share keys, one more for many chosen positions).

    append the token, choose channels  ->  logits, best of each run  ->  choose positions  ->  attend
                                           (with shared keys: logits  ->  weights, best of each run)

The host waits for none, and what they write is allocated beforehand: the chain can be captured in a CUDA graph.
"""

from torch import Tensor

from attnopt.kernels._triton import on_device_of
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import Tiles, choose_tiles
from attnopt.kernels.sparq.triton_attend import attend
from attnopt.kernels.sparq.triton_score import Token, choose_channels, score_positions
from attnopt.kernels.sparq.triton_select import (
    Chosen,
    Weights,
    choose_positions,
    is_selectable,
    sort_positions,
)


def decode(request: Request, tiles: Tiles | None = None, token: Token | None = None) -> Tensor:
    """(B, H, 1, Dv) in q's dtype, contiguous: what `steps.decode` computes, on the current stream.

    The request has been checked and is not empty; fp32, bf16 or fp16; D and Dv at most 256. `tiles` overrides
    `choose_tiles`. A token is appended at `request.lengths` first; it counts when `request.grown` is 1.
    """
    tiles = choose_tiles(request) if tiles is None else tiles
    with on_device_of(request.q):
        if request.is_exact and token is None:
            return attend(request, None, None, tiles)
        channels = choose_channels(request, token)
        if request.is_exact:
            return attend(request, None, None, tiles)
        request = served(request, tiles)
        scores, weights = score_positions(request, channels, tiles)
        return attend(request, choose(request, weights, tiles), scores, tiles)


def choose(request: Request, weights: Weights, tiles: Tiles) -> Chosen:
    """The best positions, in one program for each group where it can hold what it chooses from."""
    if is_selectable(request, tiles):
        return choose_positions(request, weights, tiles)
    return sort_positions(request, weights)


def served(request: Request, tiles: Tiles) -> Request:
    """The request with its range of positions as a mask, where the kernels need to see each position."""
    has_no_mean = request.mean_value and request.v_mean is None
    if request.kept is not None or has_no_mean or not is_selectable(request, tiles):
        return request.masked()
    return request
