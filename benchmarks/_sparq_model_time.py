"""How sparq_model_gpu.py takes times: whole steps as CUDA graphs, and whether a graph computes what its launches do."""

import gc
from collections.abc import Callable
from statistics import median

import torch
from _record import measure
from _smollm2_gpu import Attention
from _sparq_model import Decoder, Place, Setting, apart, tokens
from _streaming_text_streams import captured
from torch import Tensor

from attnopt.caches import SparqCache

#: Replays between two events: the host launches one while another runs, as when tokens are decoded.
BEHIND = 3


def stepping(decoding: Decoder, setting: Setting, place: Place, attention: Attention) -> Callable[[], Tensor]:
    """A whole step, always the same one: the length that is advanced is another one than the length that is read."""
    ids, advanced = tokens(setting, place), torch.zeros(setting.batch, dtype=torch.int32, device=place.device)

    def run() -> Tensor:
        logits = decoding.model(ids, attention)
        advanced.add_(1)
        return logits

    return run


def milliseconds(run: Callable[[], Tensor], place: Place, repeat: int) -> dict[str, float]:
    """Of a call, as a CUDA graph."""
    with torch.no_grad():
        run()
        return times(captured(run, run), place, repeat)


def times(again: Callable[[], Tensor], place: Place, repeat: int) -> dict[str, float]:
    """Median, least and most of the replays, each time of BEHIND behind each other; of calls, on the CPU."""
    if place.device.type != "cuda":
        found = measure(again, repeat)
        return {"ms": 1e3 * found["median"], "ms_min": 1e3 * found["min"], "ms_max": 1e3 * found["max"]}
    from _gpu_time import timed

    again()
    spent = [timed(lambda: [again() for _ in range(BEHIND)]) / BEHIND for _ in range(repeat)]
    return {"ms": median(spent), "ms_min": min(spent), "ms_max": max(spent)}


def replay_apart(caches: list[SparqCache], step: Callable[[], Tensor], again: Callable[[], Tensor]) -> float:
    """The gap of the worst row of a graph's logits to those of the same step launch by launch, where nothing overlaps.

    Only the mean values change from step to step: both begin with the same.
    """
    means, found = [cache.v_mean.clone() for cache in caches], []
    for run in (step, again, again):
        for cache, mean in zip(caches, means, strict=True):
            cache.v_mean.copy_(mean)
        found.append(run().clone())
    return max(float(apart(x, found[0]).max()) for x in found[1:])


def release(device: torch.device) -> None:
    """Gives the last caches' memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
