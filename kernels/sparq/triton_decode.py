"""SparQ decoding in Triton, in four launches (one more where heads share keys, one more for many chosen positions).

    append the token, choose channels  ->  logits, best of each run  ->  choose positions  ->  attend
                                           (with shared keys: logits or bounds of runs  ->  weights, best of each run)

Where there are few groups the start of a launch costs more than what it does: the first two can be one, and the last
two, or with shared keys the last three; two launches are left (`Tiles`).

The host waits for none, and what they write is allocated beforehand: the chain can be captured in a CUDA graph.
"""

from dataclasses import replace

from torch import Tensor

from attnopt.kernels._triton import can_overlap, on_device_of
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import MOST_BOUNDS, Tiles, choose_tiles, power_of_two
from attnopt.kernels.sparq.triton_attend import attend
from attnopt.kernels.sparq.triton_bound import bound_runs, bounded_weights
from attnopt.kernels.sparq.triton_joined import choose_and_attend, weigh_and_attend
from attnopt.kernels.sparq.triton_score import Scores, approximate_logits, group_weights, row_logits
from attnopt.kernels.sparq.triton_select import (
    Chosen,
    Weights,
    choose_positions,
    is_selectable,
    sort_positions,
)
from attnopt.kernels.sparq.triton_start import Channels, Start, Token, Unchosen, choose_channels


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
        if request.is_exact:
            choose_channels(request, token, early=tiles.early)
            return attend(request, None, None, tiles)
        channels = begin(request, token, tiles)
        request = served(request, tiles)
        if is_ticketed(request, tiles):
            return weigh_and_attend(request, approximate_logits(request, channels, tiles), tiles)
        scores, weights = score_positions(request, channels, tiles)
        if tiles.end_joined and is_joinable(request, tiles):
            return choose_and_attend(request, scores, weights, tiles)
        return attend(request, choose(request, weights, tiles), scores, tiles)


def begin(request: Request, token: Token | None, tiles: Tiles) -> Start:
    """The channels, the token appended; or that the next launch is to do it, which needs to know the token's place."""
    wants_mask = served(request, tiles) is not request
    if not tiles.start_joined or is_bounded(request, tiles) or (token is not None and wants_mask):
        return choose_channels(request, token, early=tiles.early)
    return Unchosen(token)


def is_joinable(request: Request, tiles: Tiles) -> bool:
    """Whether the program that chooses a group's positions can attend to them too: it holds them, in one part."""
    return is_selectable(request, tiles) and request.topk <= tiles.chosen_split


def is_ticketed(request: Request, tiles: Tiles) -> bool:
    """Whether the last program that weighs a group's positions ends the step: they are weighed in one launch."""
    if not tiles.ticket or not is_joinable(request, tiles):
        return False
    return not is_single(request, tiles) and not is_bounded(request, tiles)


def is_single(request: Request, tiles: Tiles) -> bool:
    """Whether one head alone orders the positions by its logits.

    It needs neighbouring positions side by side in memory, as the channel-major keys have them.
    """
    return request.group < tiles.dot_heads and request.keys_by_channel.stride(3) == 1


def score_positions(request: Request, chosen: Start, tiles: Tiles) -> tuple[Scores | None, Weights]:
    """Launches the logits, and unless one head alone orders the positions by them, the weights of each group.

    Where only bounds are written there are no scores.
    """
    if is_single(request, tiles):
        return row_logits(request, chosen, tiles)
    if isinstance(chosen, Channels) and is_bounded(request, tiles):
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
