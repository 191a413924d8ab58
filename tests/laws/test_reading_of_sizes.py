"""Reading a graph never asks whether a symbolic size is a certain number: the answer would be a guard, or an error."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutant_outcomes import NO_PROGRAM
from mutant_programs import graph_of, inputs_of, programs

from attnopt.backend import attnopt, reports

#: Sub-classes of numbers in Python, but not in all versions of torch: "failed to eval sub(0, True)" is one's answer.
AS_NUMBERS = ("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__")
NAMES = sorted(n for n in programs() if n.startswith(("loop_spellings", "linear_spellings")))


def symbolic(name: str) -> bool:
    try:
        graph_of(name, free=True)
    except NO_PROGRAM:
        return False
    return True


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of attnopt.passes that take a symbolic truth for a plain one, or for a number."""
    lines: list[str] = []

    def spied(plain: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any) -> Any:
            caller = sys._getframe(1)
            if "/passes/" in caller.f_code.co_filename:
                lines.append(f"{caller.f_code.co_filename}:{caller.f_lineno}")
            return plain(*args)

        return method

    for name in ("__bool__", *AS_NUMBERS):
        monkeypatch.setattr(torch.SymBool, name, spied(getattr(torch.SymBool, name)))
    return lines


@pytest.mark.parametrize("name", NAMES)
def test_no_symbolic_size_is_asked_for_its_number(name: str, asked: list[str]) -> None:
    if not symbolic(name):
        return
    attnopt(copy.deepcopy(graph_of(name, free=True)), list(inputs_of(name)), options={"inner": "eager"})
    assert asked == []
    assert reports()[-1].warnings == ()
