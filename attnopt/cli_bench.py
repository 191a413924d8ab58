"""How long a model takes, and how much memory, before and after: `attnopt bench`."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles

import torch

_PEAK = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Timing:
    """One variant: seconds per call, and peak memory in bytes (of the GPU if there is one, else of the process)."""

    name: str
    median: float
    p90: float
    calls: int
    peak_bytes: int | None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure: calls that do not count, then at most so many calls, in at most so many seconds."""

    warmup: int = 3
    calls: int = 30
    budget: float = 30.0


def measure(variants: Mapping[str, Callable[[], object]], plan: Plan) -> tuple[Timing, ...]:
    """Times all variants in turn, round by round, so that a busy machine treats them alike; three rounds at least."""
    peaks = {name: _peak_of(call, plan.warmup) for name, call in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    rounds, start = 0, time.perf_counter()
    while rounds < plan.calls and (rounds < 3 or time.perf_counter() - start < plan.budget):
        for name, call in variants.items():
            seconds[name].append(_timed(call))
        rounds += 1
    return tuple(_timing(name, seconds[name], peaks[name]) for name in variants)


def _timing(name: str, seconds: Sequence[float], peak: int | None) -> Timing:
    p90 = quantiles(seconds, n=10)[8] if len(seconds) > 1 else seconds[0]
    return Timing(name, median(seconds), p90, len(seconds), peak)


def table(timings: Sequence[Timing]) -> str:
    """The timings as plain text; the last column compares with the first line."""
    rows = [
        ("", "median", "p90", "calls", "peak memory", "speed-up"),
        *(_row(each, timings[0]) for each in timings),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    """Names to the left, numbers to the right."""
    numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
    return "  ".join([row[0].ljust(widths[0]), *numbers]).rstrip()


def _row(timing: Timing, first: Timing) -> tuple[str, ...]:
    memory = "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 1e6:,.0f} MB"
    times = f"{timing.median * 1e3:.2f} ms", f"{timing.p90 * 1e3:.2f} ms"
    return timing.name, *times, str(timing.calls), memory, f"{first.median / timing.median:.2f}x"


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _peak_of(call: Callable[[], object], warmup: int) -> int | None:
    """Peak memory of one call after the warm-up; Linux lets a process forget its peak so far."""
    for _ in range(warmup):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    if not (_RESET.exists() and _PEAK.exists()):
        return None
    _RESET.write_text("5")
    call()
    line = next(line for line in _PEAK.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
