"""What is installed: the versions that a report, a benchmark or a bug needs."""

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch


@cache
def versions() -> dict[str, str]:
    """attnopt, torch, triton and python versions, and the device."""
    named = {name: _version(name) for name in ("attnopt", "torch", "triton")}
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine()
    )
    return {**named, "python": platform.python_version(), "device": device}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"
