"""What all tests share: the environment, set before torch or attnopt is imported, and how random tests draw."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network

import hypothesis
import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read by Triton when a kernel is decorated, so: before any import

sys.path.insert(0, str(Path(__file__).parent))  # `from oracle import assert_same`

hypothesis.settings.register_profile("dev", deadline=None, max_examples=25)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("deep", deadline=None, max_examples=2_000, print_blob=True)
PROFILE = os.environ.get("ATTNOPT_HYPOTHESIS", "dev")
hypothesis.settings.load_profile(PROFILE)

#: Markers of tests that this run leaves out, with the reason.
LEFT_OUT = {
    marker: reason
    for marker, reason, applies in (
        ("gpu", "no CUDA device is here", not HAS_GPU),
        ("deep", "they run with ATTNOPT_HYPOTHESIS=deep", PROFILE != "deep"),
    )
    if applies
}


def pytest_report_header() -> list[str]:
    """Says at the top of each run what is left out, and why."""
    left_out = [f"left out: tests marked {marker!r}, as {reason}" for marker, reason in LEFT_OUT.items()]
    return [f"torch {torch.__version__}, hypothesis profile {PROFILE!r}", *left_out]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects what cannot or should not run here."""
    left_out = [item for item in items if any(item.get_closest_marker(marker) for marker in LEFT_OUT)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _same_numbers_each_run() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills fresh floating-point memory with NaN, so that output which a kernel forgets to write is found."""
    # torch remembers, for good, which functions `with torch.device(...)` applies to: let it see the real ones.
    _device_constructors()
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_and_fill(*args: object, **kwargs: object) -> Tensor:
        fresh = allocate(*args, **kwargs)
        if type(fresh) is Tensor and fresh.is_floating_point():  # a fake tensor has no memory
            fresh.detach().fill_(float("nan"))
        return fresh

    return allocate_and_fill
