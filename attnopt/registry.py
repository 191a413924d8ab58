"""Finds rules and kernels by looking into `attnopt/passes` and `attnopt/kernels`; there is no list to edit.

A module in passes/ that defines `RULE` contributes a rule; a folder in kernels/ whose module `kernel` defines `KERNEL`
contributes a kernel. Both come sorted by name, so the order never depends on the file system.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from attnopt.rule import Kernel, Rule
from attnopt.shadow import Expansions


@cache
def rules() -> tuple[Rule, ...]:
    """Every rule, sorted by name."""
    passes = importlib.import_module("attnopt.passes")
    found = (
        importlib.import_module(f"attnopt.passes.{m.name}") for m in pkgutil.iter_modules(passes.__path__)
    )
    return tuple(sorted((m.RULE for m in found if hasattr(m, "RULE")), key=lambda rule: rule.name))


@cache
def expansions() -> Expansions:
    """Every operator that a module in passes/ spells out (`EXPANSIONS`), with how."""
    passes = importlib.import_module("attnopt.passes")
    names = sorted(m.name for m in pkgutil.iter_modules(passes.__path__))
    found = (importlib.import_module(f"attnopt.passes.{name}") for name in names)
    return {target: how for module in found for target, how in getattr(module, "EXPANSIONS", {}).items()}


@cache
def kernels() -> tuple[Kernel, ...]:
    """Every kernel, sorted by name."""
    return tuple(sorted((m.KERNEL for m in _kernel_modules()), key=lambda kernel: kernel.name))


def _kernel_modules() -> Iterator[ModuleType]:
    package = importlib.import_module("attnopt.kernels")
    folders = {
        path.name
        for root in package.__path__
        for path in Path(root).iterdir()
        if (path / "kernel.py").is_file()
    }
    for name in sorted(folders):
        yield importlib.import_module(f"attnopt.kernels.{name}.kernel")
