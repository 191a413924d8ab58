"""Recurrences in torch's scan() are read as the loops that they stand for, or named and left alone."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor
from torch._higher_order_ops.scan import scan

B, H, S, D = 2, 3, 12, 8

#: torch's scan() looks at the gradients of what it is given while Dynamo traces it.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

Step = Callable[..., tuple[Tensor, Tensor]]


def tensors() -> tuple[Tensor, ...]:
    """q, k, v, the logarithm of a decay for each token, and a state."""
    q, k, v = torch.randn(3, B, H, S, D).unbind()
    return q, k, v, -torch.rand(B, H, S), torch.randn(B, H, D, D)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def read_out(q: Tensor, state: Tensor) -> Tensor:
    return torch.einsum("bhd,bhde->bhe", q, state)


def along(step: Step, start: Tensor, *given: Tensor) -> tuple[Tensor, Tensor]:
    last, out = scan(step, start, tuple(x.movedim(2, 0) for x in given))
    return last, out.movedim(0, 2)


def gated(q: Tensor, k: Tensor, v: Tensor, steps: Tensor, state: Tensor) -> Tensor:
    def step(held: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q, k, v, g = given
        held = held * g.exp()[..., None, None] + outer(k, v)
        return held, read_out(q, held)

    return along(step, torch.zeros_like(state), q, k, v, steps)[1]


def sums(held: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    q, k, v = given
    held = held + outer(k, v)
    return held, read_out(q * 0.25, held)


def summed(q: Tensor, k: Tensor, v: Tensor, steps: Tensor, state: Tensor) -> Tensor:
    return along(sums, torch.zeros_like(state), q, k, v)[1]


def continued(q: Tensor, k: Tensor, v: Tensor, steps: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    last, out = along(sums, state, q, k, v)
    return out, last


READ = {
    gated: "linear scale=1 causal decay per token",
    summed: "linear scale=0.25 causal",
    continued: "linear scale=0.25 causal initial state final state",
}


@pytest.mark.parametrize("attend", READ, ids=lambda f: f.__name__)
def test_a_scan_is_read_as_a_loop(attend):
    report = check_like_eager(attend, tensors(), differentiable=3)
    (site,) = report.sites
    assert (site.verdict, site.spec) == ("rewritten", READ[attend]), site.reason
    assert site.error is not None


# --- near misses ---


def squashed(q: Tensor, k: Tensor, v: Tensor, steps: Tensor, state: Tensor) -> Tensor:
    def step(held: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q, k, v = given
        held = (held + outer(k, v)).tanh()
        return held, read_out(q, held)

    return along(step, torch.zeros_like(state), q, k, v)[1]


def of_each_feature(
    q: Tensor, k: Tensor, v: Tensor, steps: Tensor, state: Tensor, features: Tensor
) -> Tensor:
    def step(held: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q, k, v, g = given
        held = held * g.sigmoid()[..., None] + outer(k, v)
        return held, read_out(q, held)

    return along(step, torch.zeros_like(state), q, k, v, features)[1]


def written_over(q: Tensor, k: Tensor, v: Tensor, steps: Tensor, state: Tensor) -> Tensor:
    def step(held: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q, k, v = given
        return outer(k, v), read_out(q, held)  # the state before, of one key

    return along(step, torch.zeros_like(state), q, k, v)[1]


@pytest.mark.parametrize("attend", [squashed, written_over], ids=lambda f: f.__name__)
def test_another_recurrence_is_left_alone(attend):
    report = check_like_eager(attend, tensors(), differentiable=3)
    assert report.having("rewritten", "kept") == ()


def test_gates_of_each_feature_are_refused_once():
    inputs = (*tensors(), torch.randn(B, H, S, D))
    (site,) = check_like_eager(of_each_feature, inputs, differentiable=3).sites
    assert (site.verdict, site.family, site.nearest_rule) == ("refused", "linear", "linear loop")


def test_a_length_that_is_not_known_is_named():
    report = check_like_eager(gated, tensors(), dynamic=True)
    (site,) = report.sites
    assert (site.verdict, site.family) == ("refused", "linear")
    assert "is read where its length is known" in site.reason


def test_a_scan_that_carries_no_state_of_keys_has_no_entry():
    def running_mean(x: Tensor) -> Tensor:
        def step(held: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
            held = 0.9 * held + 0.1 * given
            return held, held.clone()

        return scan(step, torch.zeros_like(x[0]), x)[1]

    assert check_like_eager(running_mean, (torch.randn(S, D),), differentiable=1).sites == ()


def test_steps_that_hold_an_attention_stay_a_body():
    def layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def step(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            x = x + ((x * scale) @ k.mT).softmax(-1) @ v
            return x, x.mean(-1)

        return scan(step, q, torch.linspace(0.1, 0.3, 3 * D).view(3, D))[0]

    report = check_like_eager(layers, torch.randn(3, B, H, S, D).unbind())
    assert [site.verdict for site in report.sites] == ["rewritten"]
