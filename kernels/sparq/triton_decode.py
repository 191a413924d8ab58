"""SparQ decoding in Triton: channels, approximate logits split over the sequence, group keys, top-k, attention.

Four launches and a top-k (one launch more when the chosen positions are split), none of which the host waits for.
"""

from torch import Tensor

from attnopt.kernels._triton import on_device_of
from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import Tiles, choose_tiles
from attnopt.kernels.sparq.triton_attend import attend
from attnopt.kernels.sparq.triton_score import approximate_logits, choose_channels, group_keys


def decode(request: Request, tiles: Tiles | None = None) -> Tensor:
    """(B, H, 1, Dv) in q's dtype, contiguous: what `steps.decode` computes, on the current stream.

    The request has been checked and is not empty; fp32, bf16 or fp16; D and Dv at most 256. `tiles` overrides
    `choose_tiles`.
    """
    tiles = choose_tiles(request) if tiles is None else tiles
    with on_device_of(request.q):
        if request.is_exact:
            return attend(request, None, None, tiles)
        scores = approximate_logits(request, choose_channels(request), tiles)
        positions = choose_positions(group_keys(request, scores, tiles), request.topk)
        return attend(request, positions, scores, tiles)


def choose_positions(keys: Tensor, topk: int) -> Tensor:
    """(P, topk) int64: where the largest keys (P, Sk) are. Keys differ, so ties and order are settled before."""
    return keys.topk(topk, dim=-1).indices
