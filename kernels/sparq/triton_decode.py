"""SparQ decoding in Triton, in four launches (one more where heads share keys, one more for many chosen positions).

    append the token, choose channels  ->  logits, best of each run  ->  choose positions  ->  attend
                                           (with shared keys: logits or bounds of runs  ->  weights, best of each run)

The host waits for none, and what they write is allocated beforehand: the chain can be captured in a CUDA graph.
"""

from dataclasses import replace

from torch import Tensor

from attnopt.kernels._triton import can_overlap, on_device_of
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import MOST_BOUNDS, Tiles, choose_tiles, power_of_two
from attnopt.kernels.sparq.triton_attend import attend
from attnopt.kernels.sparq.triton_bound import bound_runs, bounded_weights
from attnopt.kernels.sparq.triton_score import (
    Channels,
    Scores,
    Token,
    approximate_logits,
    choose_channels,
    group_weights,
    row_logits,
)
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
    tiles = replace(tiles, early=tiles.early and can_overlap(request.q))
    with on_device_of(request.q):
        if request.is_exact and token is None:
            return attend(request, None, None, tiles)
        channels = choose_channels(request, token, early=tiles.early)
        if request.is_exact:
            return attend(request, None, None, tiles)
        request = served(request, tiles)
        scores, weights = score_positions(request, channels, tiles)
        return attend(request, choose(request, weights, tiles), scores, tiles)


def score_positions(request: Request, chosen: Channels, tiles: Tiles) -> tuple[Scores | None, Weights]:
    """Launches the logits, and unless one head alone orders the positions by them, the weights of each group.

    One head alone needs neighbouring positions side by side in memory, as the channel-major keys have them. Where only
    bounds are written there are no scores.
    """
    if request.group < tiles.dot_heads and request.keys_by_channel.stride(3) == 1:
        return row_logits(request, chosen, tiles)
    if is_bounded(request, tiles):
        return None, bounded_weights(request, chosen, bound_runs(request, chosen, tiles), tiles)
    scores = approximate_logits(request, chosen, tiles)
    return scores, group_weights(request, scores, tiles)


def is_bounded(request: Request, tiles: Tiles) -> bool:
    """Whether bounds may stand for logits: nothing else needs these, there is no mask, and one program holds them."""
    if (
        not tiles.bounded
        or request.mean_value
        or request.kept is not None
        or not is_selectable(request, tiles)
    ):
        return False
    bounds = -(-request.k.shape[2] // tiles.block) * power_of_two(request.group)
    return bounds <= MOST_BOUNDS and tiles.block % tiles.run == 0


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
