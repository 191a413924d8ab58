"""A mask from another compiled graph is proven by the note that this graph left on it, and only while it holds."""

from collections.abc import Callable

import pytest
import torch
from compiling import compiled, reports_after
from torch import Tensor

import attnopt
from attnopt.buffers import note_on, write_note
from attnopt.guards import Either, Note, Noting


def test_a_note_holds_until_the_tensor_is_written_to() -> None:
    held = torch.zeros(3)
    assert note_on(held) is None
    write_note(held, "form")
    assert note_on(held) == "form"
    assert note_on(held.clone()) is None
    held[:2].add_(1)
    assert note_on(held) is None


def test_tensors_without_versions_carry_no_notes() -> None:
    with torch.inference_mode():
        held = torch.zeros(3)
        write_note(held, "form")
    assert note_on(held) is None


def test_the_graph_without_assumptions_answers_where_a_note_is_missing() -> None:
    noted, plain, other = (torch.zeros(3) for _ in range(3))
    graph = Either(lambda *_: "noted", lambda *_: "plain", [Note(1, "form")])
    assert Noting(lambda x: (0, x), {1: "form"})(noted) == (0, noted)
    write_note(other, "another form")
    assert [graph(None, x) for x in (noted, plain, other)] == ["noted", "plain", "plain"]


def causal(n: int) -> Tensor:
    return torch.full((n, n), -torch.inf).triu(1)


def broken(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Attention, with a graph break after the mask was made, in which it is changed."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = causal(q.shape[2])
        torch._dynamo.graph_break()
        mask = torch._dynamo.disable(change)(mask)
        return (q @ k.mT * 0.25 + mask).softmax(-1) @ v

    return function


def inputs(n: int, *, gradient: bool) -> list[Tensor]:
    return [torch.randn(2, 3, n, 16).requires_grad_(gradient) for _ in range(3)]


def specs(before: tuple[object, ...]) -> set[str]:
    return {site.spec for site in reports_after(before).sites}  # type: ignore[arg-type]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_a_mask_is_proven_across_a_graph_break(dynamic: bool, gradient: bool) -> None:
    function, before = broken(lambda x: x), attnopt.reports()
    fast = compiled(function, dynamic=dynamic)
    for n in (9, 11):
        given = inputs(n, gradient=gradient)
        torch.testing.assert_close(fast(*given), function(*given))
    assert specs(before) == {"softmax scale=0.25 causal"}
    if gradient:
        fast(*given).sum().backward()
        found = [x.grad for x in given]
        again = [x.detach().clone().requires_grad_() for x in given]
        function(*again).sum().backward()
        torch.testing.assert_close(found, [x.grad for x in again])


@pytest.mark.parametrize(
    "change",
    [lambda x: x + 0, lambda x: x.clone(), lambda x: x.tril_(), lambda x: x.fill_(0), lambda x: x.T],
)
def test_a_mask_that_eager_code_changed_is_data(change: Callable[[Tensor], Tensor]) -> None:
    function, before = broken(change), attnopt.reports()
    given = inputs(9, gradient=False)
    torch.testing.assert_close(compiled(function)(*given), function(*given))
    assert specs(before) == {"softmax scale=0.25 full bias"}


def test_the_same_code_serves_other_masks() -> None:
    """The second graph is compiled for a proven mask, and then gets others of the same shape."""
    changes = [lambda x: x, lambda x: x * 2 + 1, lambda x: x.fill_(0), lambda x: x]
    turns = iter(changes)

    def change_next(x: Tensor) -> Tensor:
        return next(turns)(x)

    given, before = inputs(9, gradient=False), attnopt.reports()
    fast = compiled(broken(change_next))
    for change in changes:
        torch.testing.assert_close(fast(*given), broken(change)(*given))
    assert specs(before) == {"softmax scale=0.25 causal"}
    assert all(report.warnings == () for report in attnopt.reports() if report not in before)


def test_explain_sees_the_same() -> None:
    report = attnopt.explain(broken(lambda x: x), *inputs(9, gradient=False))
    assert [site.spec for site in report.sites] == ["softmax scale=0.25 causal"]
