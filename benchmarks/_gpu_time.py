"""Times on a GPU that every benchmark takes in the same way: replays of CUDA graphs, and what a copy reaches."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from triton.testing import do_bench

#: Seconds of rest before a contender's turn: at its power limit a card is slower for whoever follows a hot one.
REST = 0.1


def replayed(once: Callable[[], object], inner: int = 3, repeat: int = 9) -> dict[str, float]:
    """Milliseconds of one call inside a CUDA graph: median, least and most of `repeat` replays of `inner` calls."""
    return replayed_in_turn([once], inner, repeat)[0]


def replayed_in_turn(
    calls: Sequence[Callable[[], object]], inner: int = 1, repeat: int = 9
) -> list[dict[str, float]]:
    """The same of several calls, a replay of each in every round: clocks and heat that drift meet all of them alike.

    Their graphs share their memory, so that many large ones fit.
    """
    pool = torch.cuda.graph_pool_handle()
    graphs = [_captured(once, inner, pool) for once in calls]
    for graph in graphs:
        graph.replay()
    torch.cuda.synchronize()
    time.sleep(REST)
    rounds = [[timed(graph.replay) / inner for graph in graphs] for _ in range(repeat)]
    return [
        {"ms": median(times), "ms_min": min(times), "ms_max": max(times)}
        for times in zip(*rounds, strict=True)
    ]


def _captured(once: Callable[[], object], inner: int, pool: tuple[int, int]) -> torch.cuda.CUDAGraph:
    """A graph of `inner` calls; what they compile is compiled before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        once()
        once()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        for _ in range(inner):
            once()
    return graph


def timed(run: Callable[[], object]) -> float:
    """Milliseconds between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def copy_rate() -> float:
    """Bytes read and written per second by a device-to-device copy; not in a graph, where the copy node is slower."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2e3 * source.nbytes / do_bench(lambda: target.copy_(source), return_mode="median")
