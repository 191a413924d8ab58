"""Kernels that read, change and write shared memory at once give other bits each time: none here sums by atomics.

Taking a ticket, one more than the last one's, is no sum: whole numbers come out the same in any order.

https://github.com/fla-org/flash-linear-attention/issues/889, https://github.com/Dao-AILab/flash-attention/issues/359
"""

import ast
from collections.abc import Iterator

from source import PACKAGE

KERNELS = [module for module in PACKAGE if module.name.startswith("attnopt.kernels.")]


def atomics(text: str) -> Iterator[ast.Call]:
    """Calls of an operation whose name says atomic."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and "atomic" in node.func.attr:
            yield node


def takes_a_ticket(call: ast.Call) -> bool:
    """Whether it adds 1."""
    return ast.unparse(call.func) == "tl.atomic_add" and ast.unparse(call.args[1]) == "1"


def test_no_kernel_adds_numbers_atomically() -> None:
    found = {module.name: [*atomics(module.text)] for module in KERNELS}
    assert [name for name, calls in found.items() if not all(map(takes_a_ticket, calls))] == []
    with_tickets = ["attnopt.kernels.sparq.triton_joined", "attnopt.kernels.streaming.triton_decode"]
    assert sorted(name for name, calls in found.items() if calls) == with_tickets
    assert any(module.is_triton for module in KERNELS)


def test_a_sum_is_told_from_a_ticket() -> None:
    calls = (
        "tl.atomic_add(p, x)",
        "tl.atomic_add(p, 1.0)",
        "tl.atomic_max(p, 1)",
        "gl.atomic_add(p, 1, sem='x')",
    )
    assert not any(takes_a_ticket(call) for text in calls for call in atomics(text))
