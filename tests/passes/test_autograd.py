"""A site whose parts have gradients of their own is left alone; where no gradient goes through, nothing is lost."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import aten_graph, shadow_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnopt.backend import rewrite_graph
from attnopt.options import Options
from attnopt.passes.autograd import grad_modes

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def tensors() -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 3, 5, 8) for _ in range(3))


def weights_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        weights = (q @ k.mT).softmax(-1)
    return weights @ v


def scores_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        scores = q @ k.mT
    return scores.softmax(-1) @ v


def keys_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        keys = (0.5 * k).mT
    return (q @ keys).softmax(-1) @ v


def values_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        values = v.transpose(1, 2).transpose(1, 2)
    return (q @ k.mT).softmax(-1) @ values


def state_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        state = k.mT @ v
    return q @ state


def triangle_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        scores = q @ k.mT
    return scores.tril() @ v


def hooked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    if scores.requires_grad:
        scores.register_hook(lambda gradient: 2 * gradient)
    return scores.softmax(-1) @ v


class Tripled(torch.autograd.Function):
    """Hands on its input, and three times its gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient * 3


def through_a_function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return Tripled.apply(q @ k.mT).softmax(-1) @ v


#: torch's own tracing makes one.
of_functions = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


OWN_GRADIENTS = [
    weights_without, scores_without, keys_without, values_without, state_without, triangle_without, hooked,
    through_a_function,
]  # fmt: skip


@of_functions
@pytest.mark.parametrize("attend", OWN_GRADIENTS, ids=lambda f: f.__name__)
def test_parts_with_gradients_of_their_own_are_kept(attend: Attend) -> None:
    report = check_like_eager(attend, tensors(), differentiable=3)
    assert report.having("rewritten") == ()
    assert any("no_grad" in s.reason or "gradient of its own" in s.reason for s in report.sites)


@pytest.mark.parametrize("attend", OWN_GRADIENTS[:6], ids=lambda f: f.__name__)
def test_without_gradients_there_is_nothing_to_keep(attend: Attend) -> None:
    report, _ = rewrite_graph(aten_graph(attend, *tensors()), Options(), gradient=False)
    assert [site.verdict for site in report.attention] == ["rewritten"]


def mask_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
        mask = torch.zeros(5, 5).to(q.dtype).masked_fill(hidden, float("-inf"))
    return (q @ k.mT + mask).softmax(-1) @ v


def all_without(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        out = (q @ k.mT).softmax(-1) @ v
    return out + q


def detached_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.detach().mT).softmax(-1) @ v


@pytest.mark.parametrize("attend", [mask_without, all_without, detached_keys], ids=lambda f: f.__name__)
def test_what_gets_its_gradient_as_a_whole_is_rewritten(attend: Attend) -> None:
    report = check_like_eager(attend, tensors(), differentiable=3)
    assert [site.verdict for site in report.sites] == ["rewritten"]


def test_modes_follow_the_order_of_the_graph() -> None:
    shadow = shadow_of(weights_without, *tensors())
    modes = {str(node.target): on for node, on in grad_modes(shadow).items() if node.op == "call_function"}
    assert modes["aten.softmax.int"] is False
    assert [on for node, on in grad_modes(shadow).items() if "matmul" in str(node.target)] == [False, True]


# --- inputs on which the attention does not depend ---


def weighed(scores: Tensor, shift: Tensor, v: Tensor) -> Tensor:
    """Softmax by hand; what is subtracted is as large as the largest score, or larger."""
    weights = (scores - torch.maximum(scores.max(-1, keepdim=True).values, shift)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def beside_the_maximum(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
    return weighed(q @ k.mT, other, v)


def written_into_what_is_subtracted(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
    shift = q.new_zeros(3, 1, 1)
    shift.copy_(other)
    return weighed(q @ k.mT, shift, v)


def one_part_of_a_split(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
    _, shift = torch.cat([other, other + 1], -1).split(1, -1)
    return weighed(q @ k.mT, shift, v)


def checkpointed(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
    return checkpoint(beside_the_maximum, q, k, v, other, use_reentrant=False)


ZEROS = [beside_the_maximum, written_into_what_is_subtracted, one_part_of_a_split, checkpointed]


def with_other() -> tuple[Tensor, ...]:
    return (*tensors(), torch.randn(3, 1, 1))


@pytest.mark.parametrize("attend", ZEROS, ids=lambda f: f.__name__)
def test_an_input_that_gets_zeros_keeps_its_gradient(attend: Callable[..., Tensor]) -> None:
    report = check_like_eager(attend, with_other(), differentiable=4)
    assert report.having("rewritten") == ()
    assert any("gets a gradient of zeros" in site.reason for site in report.sites)


@pytest.mark.parametrize("attend", ZEROS, ids=lambda f: f.__name__)
def test_an_input_that_gets_no_gradient_may_go(attend: Callable[..., Tensor]) -> None:
    report = check_like_eager(attend, with_other(), differentiable=3)
    assert [site.verdict for site in report.attention] == ["rewritten"]


def detached(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
    return weighed(q @ k.mT, other.detach(), v)


def made_of_an_operand(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
    return weighed(q @ (k * other).mT, other, v)


def asked_for_its_shape(q: Tensor, k: Tensor, v: Tensor, other: Tensor) -> Tensor:
    return weighed(q @ k.mT, torch.ones_like(other), v)


@pytest.mark.parametrize(
    "attend", [detached, made_of_an_operand, asked_for_its_shape], ids=lambda f: f.__name__
)
def test_an_input_that_loses_no_gradient_may_go(attend: Callable[..., Tensor]) -> None:
    report = check_like_eager(attend, with_other(), differentiable=4)
    assert [site.verdict for site in report.attention] == ["rewritten"]
