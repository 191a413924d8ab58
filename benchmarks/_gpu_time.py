"""Times on a GPU that every benchmark takes in the same way: replays of CUDA graphs, and what a copy reaches."""

from collections.abc import Callable
from statistics import median

import torch
from triton.testing import do_bench


def replayed(once: Callable[[], object], inner: int = 3, repeat: int = 9) -> dict[str, float]:
    """Milliseconds of one call inside a CUDA graph: median, least and most of `repeat` replays of `inner` calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        once()
        once()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            once()
    graph.replay()
    times = [timed(graph.replay) / inner for _ in range(repeat)]
    return {"ms": median(times), "ms_min": min(times), "ms_max": max(times)}


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
