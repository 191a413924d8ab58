"""`import attnopt` brings nothing that torch does not; the seconds are measured by benchmarks/import_time.py."""

import subprocess
import sys

import pytest

HEAVY = (
    "transformers",
    "triton",
    "matplotlib",
    "jinja2",
    "typer",
    "rich",
    "torch._dynamo",
    "torch._inductor",
)


def modules_after(statement: str) -> set[str]:
    """The names of the modules that a fresh process holds after `statement`."""
    code = f"{statement}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


@pytest.fixture(scope="module")
def brought() -> set[str]:
    """The modules that attnopt adds to those of torch."""
    return modules_after("import torch, attnopt") - modules_after("import torch")


@pytest.mark.parametrize("package", HEAVY)
def test_heavy_packages_wait_until_they_are_used(brought: set[str], package: str) -> None:
    assert [name for name in brought if name == package or name.startswith(f"{package}.")] == []


def test_of_attnopt_itself_come_the_operators_and_not_what_they_run(brought: set[str]) -> None:
    parts = {name.removeprefix("attnopt.") for name in brought if name.startswith("attnopt.")}
    assert parts - {"ops", "errors"} == {name for name in parts if name.split(".")[0] == "kernels"}
    assert "kernels.streaming.chunked" not in parts


def test_what_waits_is_there_when_it_is_asked_for() -> None:
    names = "Options, AttentionSpec, explain, rewrite, reports"
    assert "attnopt.programs" in modules_after(f"from attnopt import {names}")
