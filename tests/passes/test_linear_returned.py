"""Inner values of linear attention that the graph returns: computed anyway, so a call would save nothing or less."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

B, H, S, D = 2, 3, 17, 8


def tensors() -> tuple[Tensor, ...]:
    q, k, v = torch.randn(3, B, H, S, D).unbind()
    return q, k, v, -torch.rand(B, H, S)


def gates(steps: Tensor) -> Tensor:
    run = steps.cumsum(-1)
    return (run[..., :, None] - run[..., None, :]).tril().exp().tril()


def weights_of_a_triangle(q: Tensor, k: Tensor, v: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
    weights = (q @ k.mT * 0.25).tril()
    return weights @ v, weights


def weights_with_gates(q: Tensor, k: Tensor, v: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
    weights = (q * 0.25) @ k.mT * gates(steps)  # fla, ops/simple_gla/naive.py
    return weights @ v, weights


def state_of_all_keys(q: Tensor, k: Tensor, v: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
    state = k.mT @ v
    return (q * 0.25) @ state, state


KEPT = {
    weights_of_a_triangle: "linear scale=0.25 causal",
    weights_with_gates: "linear scale=0.25 causal decay per token",
    state_of_all_keys: "linear scale=0.25 full",
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("attend", KEPT, ids=lambda f: f.__name__)
def test_what_is_returned_is_computed_anyway(attend, dynamic):
    (site,) = check_like_eager(attend, tensors(), differentiable=3, dynamic=dynamic).attention
    assert (site.verdict, site.spec) == ("kept", KEPT[attend])
    assert "is also returned by the graph, so it must be computed anyway" in site.reason
    assert site.error is not None


def test_scores_that_are_returned_leave_the_rest_to_a_kernel():
    def attend(q, k, v, steps):
        scores = q @ k.mT
        return (scores * 0.25 * gates(steps)) @ v, scores

    (site,) = check_like_eager(attend, tensors(), differentiable=3).attention
    assert (site.verdict, site.spec) == ("rewritten", "linear scale=0.25 causal decay per token")


# --- near misses ---


def written_to_afterwards(q: Tensor, k: Tensor, v: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
    weights = (q @ k.mT).tril()
    out = weights @ v
    return out, weights.mul_(2)


def returned_as_a_view(q: Tensor, k: Tensor, v: Tensor, steps: Tensor) -> tuple[Tensor, ...]:
    weights = (q @ k.mT).tril()
    return weights @ v, weights.mT


@pytest.mark.parametrize("attend", [written_to_afterwards, returned_as_a_view], ids=lambda f: f.__name__)
def test_other_uses_leave_the_site_alone(attend):
    (site,) = check_like_eager(attend, tensors()).attention
    assert site.verdict == "refused"
    assert "an inner value of the attention" in site.reason
