"""Linear attention that somebody may well write, and that a rewrite may well get wrong."""

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name
from adversaries import ADVERSARIES, Adversary, D, H, S, adversary
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Sizes that stay numbers where others are symbolic.
FIXED = (H, D)
_EARLIER = len(ADVERSARIES)


def decay_of(q: Tensor, rate: float) -> Tensor:
    """rate ** (i - j) at and below the diagonal, 0 above."""
    at = torch.arange(q.shape[-2])
    far = at[:, None] - at[None]
    return torch.where(far >= 0, rate ** far.to(q.dtype), 0.0)


def retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * decay_of(q, 0.9)) @ v


@adversary(square=True)
def scores_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.no_grad():
        s = (q @ k.mT).tril()
    return s @ v


@adversary(square=True)
def normaliser_without_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = F.elu(q) + 1, F.elu(k) + 1
    s = (q @ k.mT).tril()
    return (s @ v) / s.sum(-1, keepdim=True).detach()


@adversary(square=True)
def hook_on_turned_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    turned = k.flip(-1)
    if turned.requires_grad:
        turned.register_hook(lambda g: g * 3)
    return retention(q, turned, v)


@adversary(square=True)
def output_written_to(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out = retention(q, k, v)
    out += q
    out[:, :, 0] = 0.0
    return out


@adversary(lambda: (torch.rand(H, 1, 1),), differentiable=4, square=True)
def learned_decay(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
    at = torch.arange(q.shape[-2])
    far = (at[:, None] - at[None]).clamp(min=0)
    return (q @ k.mT * (-rate.exp() * far).exp()).tril() @ v


@adversary(square=True)
def decay_narrowed_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decay = decay_of(q, 0.9)
    decay[:, 0] = 0.0
    return (q @ k.mT * decay) @ v


@adversary(differentiable=0, square=True)  # autograd forbids it
def decay_changed_between_two_layers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    decay = decay_of(q, 0.9)
    first = (q @ k.mT * decay) @ v
    decay.mul_(0.5)
    return (first @ k.mT * decay) @ v


@adversary(square=True)
def state_used_as_well(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    state = k.mT @ v
    return q @ state, state.square().mean((-1, -2))


@adversary(square=True)
def scores_used_as_well(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    s = (q @ k.mT).tril()
    return s @ v, s.abs().sum(-1)


@adversary(square=True)
def checkpoint_around_retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    first = checkpoint(retention, q.tanh(), k, v, use_reentrant=False)
    return first + retention(first.tanh(), k, v)


@adversary(square=True)
def features_written_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q * 1, k * 1
    q.relu_()
    k.clamp_(min=0.1)
    return (q @ k.mT).tril() @ v


@adversary(square=True)
def running_sum_of_outer_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k.softmax(-1)
    states = (k[..., None] * v[..., None, :]).cumsum(2)
    return (q[..., None, :] @ states)[..., 0, :]


@adversary(fixed=True, square=True)
def token_by_token_with_a_detached_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(q.shape[0], H, D, D, dtype=q.dtype), []
    for n in range(S):
        state = 0.9 * state.detach() + k[:, :, n, :, None] * v[:, :, n, None, :]
        out.append((q[:, :, n, None, :] @ state)[:, :, 0])
    return torch.stack(out, 2)


@adversary(fixed=True, square=True)
def token_by_token_with_a_reset(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    state, out = torch.zeros(q.shape[0], H, D, D, dtype=q.dtype), []
    for n in range(S):
        state = (0.0 if n == 3 else 0.9) * state + k[:, :, n, :, None] * v[:, :, n, None, :]
        out.append((q[:, :, n, None, :] @ state)[:, :, 0])
    return torch.stack(out, 2)


@adversary(differentiable=0, square=True)
def autocast_around_retention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return retention(q, k, v)


@adversary(square=True)
def one_feature_map_for_both_and_double_use(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    x = F.relu(q + k)
    first = (x @ x.mT).tril() @ v
    return (x @ x.mT).triu() @ first


LINEAR: list[Adversary] = ADVERSARIES[_EARLIER:]
