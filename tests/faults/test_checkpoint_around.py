"""What attnopt computes while compiling is no part of the model: hooks around a model do not see its tensors."""

import pytest
import torch
from compiling import compiled, reports_after
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import attnopt

#: torch's own compiler asks for the gradient of what passes from layer to layer.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.mT * 0.25, -1) @ x


def linear(x: Tensor) -> Tensor:
    return (x @ x.mT).tril() @ x


@pytest.mark.parametrize("attend", [softmax, linear])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_layers_inside_a_checkpoint_compile_and_train(attend, inner, use_reentrant) -> None:
    earlier = attnopt.reports()
    run = compiled(attend, inner=inner, strict=True)
    gradients = []
    for layer in (run, attend):
        x = torch.linspace(-1, 1, 2 * 3 * 20 * 16, dtype=torch.float64).view(2, 3, 20, 16).requires_grad_()
        y = checkpoint(layer, x * 0.1, use_reentrant=use_reentrant)
        checkpoint(layer, y, use_reentrant=use_reentrant).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    assert reports_after(earlier).having("rewritten")


@pytest.mark.parametrize("attend", [softmax, linear])
def test_hooks_see_as_many_tensors_in_the_first_call_as_in_the_second(attend) -> None:
    run, x, counts = compiled(attend, strict=True), torch.randn(2, 3, 20, 16, requires_grad=True), []
    for _ in range(2):
        seen: list[Tensor] = []
        with saved_tensors_hooks(lambda saved, seen=seen: seen.append(saved) or saved, lambda saved: saved):
            run(x)
        counts.append(len(seen))
    assert counts[0] == counts[1] > 0
