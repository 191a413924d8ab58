"""What every benchmark records: the device, the versions, the commit, and times with their spread."""

import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def environment() -> dict[str, object]:
    """Where a number was taken: a time means nothing without it."""
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # other work on the machine makes CPU times useless
        "python": platform.python_version(),
        "versions": {
            name: _version(name) for name in ("torch", "triton", "flash-linear-attention", "fla-core")
        },
        "commit": _commit(),
    }


def measure(run: Callable[[], object], repeat: int) -> dict[str, float]:
    """Seconds of `run` on the CPU: median, least and most of `repeat` runs after one that is not counted."""
    run()
    seconds = [_seconds(run) for _ in range(repeat)]
    return {"median": median(seconds), "min": min(seconds), "max": max(seconds)}


def write(name: str, payload: dict[str, object], path: Path | None = None) -> Path:
    """Writes the payload and the environment as JSON: to `path`, or to results/<name>.json."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": name, "environment": environment(), **payload}, indent=1) + "\n")
    return path


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = [shutil.which("git") or "git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
