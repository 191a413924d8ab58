"""What a report says about the installation."""

import platform
from importlib.metadata import version

import torch

from attnopt.versions import versions


def test_the_versions_are_those_installed() -> None:
    found = versions()
    assert found["torch"] == version("torch")
    assert found["attnopt"] == version("attnopt")
    assert found["python"] == platform.python_version()


def test_the_device_has_a_name() -> None:
    found = versions()["device"]
    assert found
    assert not torch.cuda.is_available() or found == torch.cuda.get_device_name()
