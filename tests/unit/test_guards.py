"""What is proven from a buffer is checked at run time: when the buffer changes, the original graph answers."""

import warnings
from collections.abc import Callable

import pytest
import torch
from compiling import compiled, reports_after
from torch import Tensor, nn
from torch.fx import symbolic_trace

import attnopt
from attnopt.buffers import BUFFER, offer
from attnopt.guards import Guard, Guarded
from attnopt.passes.mask_literals import form_of


def triangle(n: int = 6) -> Tensor:
    return torch.ones(n, n).tril()


def test_the_same_memory_at_the_same_version_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    held = triangle()
    guard = Guard(1, form_of(held))
    assert guard.holds([None, held])
    monkeypatch.setattr("attnopt.guards.form_of", lambda _: pytest.fail("looked at it again"))
    assert guard.holds([None, held])


def test_another_tensor_of_the_same_form_passes() -> None:
    guard = Guard(0, form_of(triangle()))
    assert guard.holds([triangle(9)])
    assert guard.holds([triangle().bool().float()])


def change_in_place(x: Tensor) -> Tensor:
    return x.index_put_((torch.tensor(4), torch.tensor(1)), torch.tensor(0.0))


def replace_the_memory(x: Tensor) -> Tensor:
    x.data = torch.ones(6, 6)
    return x


def read_it_otherwise(x: Tensor) -> Tensor:
    return x.t()


@pytest.mark.parametrize("change", [change_in_place, replace_the_memory, read_it_otherwise, torch.zeros_like])
def test_a_change_is_noticed(change: Callable[[Tensor], Tensor]) -> None:
    held = triangle()
    guard = Guard(0, form_of(held))
    assert guard.holds([held])
    assert not guard.holds([change(held)])


def test_a_tensor_without_versions_is_never_trusted() -> None:
    with torch.inference_mode():
        held = triangle()
    assert not Guard(0, form_of(triangle())).holds([held])


def test_the_original_answers_with_one_warning() -> None:
    graph = Guarded(lambda _: "compiled", symbolic_trace(lambda x: x + 0), [Guard(0, form_of(triangle()))])
    assert graph(triangle()) == "compiled"
    with pytest.warns(RuntimeWarning, match="has changed"):
        assert torch.equal(graph(torch.zeros(2, 2)), torch.zeros(2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graph(torch.zeros(2, 2))
    assert graph(triangle()) == "compiled"


class Model(nn.Module):
    """nanoGPT's attention: a causal mask in a buffer."""

    def __init__(self, mask: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("seen", triangle(32).view(1, 1, 32, 32) if mask is None else mask)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * 0.5
        n = q.shape[2]
        return scores.masked_fill(self.seen[:, :, :n, :n] == 0, -torch.inf).softmax(-1) @ v


def inputs(n: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, 3, n, 4).unbind()
    return q, k, v


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_mask_in_a_buffer_is_proven_and_watched(dynamic: bool) -> None:
    model, before = Model(), attnopt.reports()
    function = compiled(model, dynamic=dynamic)
    for n in (9, 11):
        given = inputs(n)
        torch.testing.assert_close(function(*given), model(*given))
    assert {site.spec for site in reports_after(before).sites} == {"softmax scale=0.5 causal"}
    model.seen[..., 3, 1] = 0
    with pytest.warns(RuntimeWarning, match="has changed"):
        torch.testing.assert_close(function(*given), model(*given))
    model.seen = triangle(32).bool()[None, None]  # another dtype: torch compiles it anew
    torch.testing.assert_close(function(*given), model(*given))


def test_another_model_may_run_the_same_compiled_code() -> None:
    models = [Model(), Model(), Model(triangle(32).tril(-1).view(1, 1, 32, 32) + torch.eye(32))]
    models.append(Model(torch.ones(1, 1, 32, 32)))
    torch._dynamo.reset()
    functions = [torch.compile(m, backend="attnopt", options={"inner": "eager"}) for m in models]
    given = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model, function in zip(models, functions, strict=True):
            torch.testing.assert_close(function(*given), model(*given))


def test_gradients_flow_through_both_answers() -> None:
    model = Model()
    function = compiled(model)
    for change in (lambda: None, lambda: model.seen.fill_(1)):
        change()
        got, want = ([x.requires_grad_() for x in given] for given in [inputs()] * 2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(*got).square().sum().backward()
        gradients = [x.grad.clone() for x in got]
        for x in want:
            x.grad = None
        model(*want).square().sum().backward()
        for gradient, x in zip(gradients, want, strict=True):
            torch.testing.assert_close(gradient, x.grad)


class Counting(Model):
    """Writes to its mask while it runs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen[..., 0, 1].add_(1)
        return super().forward(q, k, v)


def test_a_buffer_that_the_graph_writes_to_proves_nothing() -> None:
    model, twin = Counting(), Counting()
    function = compiled(model)
    for _ in range(2):
        given = inputs()
        torch.testing.assert_close(function(*given), twin(*given))


def test_only_masks_and_positions_that_modules_hold_are_offered() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", triangle())
            self.register_buffer("count", torch.zeros(()))
            self.weight = nn.Parameter(torch.ones(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.mask * self.count * self.weight

    offered = []

    def backend(module, given):
        offer(module, given)
        offered.extend(n.name for n in module.graph.nodes if BUFFER in n.meta)
        return module.forward

    torch._dynamo.reset()
    torch.compile(Holder(), backend=backend)(torch.ones(6, 6))
    assert [name for name in offered if "mask" in name] == offered != []
