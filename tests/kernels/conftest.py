"""Kernels are tested on poisoned memory."""

import pytest


@pytest.fixture(autouse=True)
def _memory_is_poisoned(poisoned_memory: None) -> None:
    """Each test of a kernel finds output that was not written."""
