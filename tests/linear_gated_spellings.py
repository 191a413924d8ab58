"""More linear attention as real code spells it: gates per token, segment sums, broadcast products, retention.

As `linear_spellings`; the sources are named in the comments.
"""

import math
from collections.abc import Callable

import torch
from linear_spellings import (
    DV,
    D,
    H,
    S,
    Spelling,
    causal,
    decay_of,
    distance,
    gated,
    plain,
    scores,
    token_first,
)
from torch import Tensor
from torch.nn import functional

GATED: list[Spelling] = []

PER_TOKEN = "scale=1 causal decay per token"


def spelling(
    spec: str, inputs: Callable[[], tuple[Tensor, ...]] = gated
) -> Callable[..., Callable[..., Tensor]]:
    """Registers a function as a spelling of `spec`."""

    def register(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        GATED.append(Spelling(attend, f"linear {spec}", inputs))
        return attend

    return register


def gated_token_first() -> tuple[Tensor, ...]:
    """q, k, v (B, S, H, D), and log decays (B, S, H)."""
    return *token_first(), -torch.rand(2, S, H)


def state_space() -> tuple[Tensor, ...]:
    """C, B (B, S, H, D), x (B, S, H, DV) and steps (B, S, H), as Mamba-2 calls them."""
    return *token_first(), torch.randn(2, S, H)


def chunked_state_space() -> tuple[Tensor, ...]:
    """As `state_space`, cut into 3 chunks of 5 tokens."""
    return *(torch.randn(2, 3, 5, H, width) for width in (D, D, DV)), -torch.rand(2, H, 3, 5)


def many_channels() -> tuple[Tensor, ...]:
    """Channels before positions, as pictures have them."""
    return tuple(torch.randn(2, H, width, S) for width in (D, D, D))


def differences(sums: Tensor) -> Tensor:
    return sums[..., :, None] - sums[..., None, :]


def future(x: Tensor) -> Tensor:
    return ~causal(x)


# A gate for each token (Dao and Gu 2024, arXiv:2405.21060, eq. 5).


@spelling("scale=0.3 causal decay per token")  # fla-org/flash-linear-attention, ops/simple_gla/naive.py
def exponential_of_a_triangle(q, k, v, steps):
    q, k, v, steps = (x.float() if x.dtype != torch.float64 else x for x in (q, k, v, steps))
    weights = torch.einsum("bhqd,bhkd->bhqk", q * 0.3, k)
    return torch.einsum("bhqk,bhkd->bhqd", weights * differences(steps.cumsum(-1)).tril().exp().tril(), v)


@spelling(PER_TOKEN)
def tril_of_the_weighed_scores(q, k, v, steps):
    return (scores(q, k) * differences(steps.cumsum(-1)).exp()).tril() @ v


@spelling(PER_TOKEN)
def chosen_before_and_after(q, k, v, steps):
    exponent = torch.where(causal(q), differences(steps.cumsum(-1)), -math.inf)
    return torch.where(causal(q), scores(q, k) * exponent.exp(), 0.0) @ v


@spelling(PER_TOKEN, gated_token_first)
def tokens_first_all_in_one_einsum(q, k, v, steps):
    run = steps.cumsum(1).transpose(1, 2)
    decay = differences(run).masked_fill(~torch.ones(S, S, dtype=torch.bool).tril(), -math.inf).exp()
    return torch.einsum("blhd,bshd,bhls,bshp->blhp", q, k, decay, v)


@spelling(PER_TOKEN)
def gates_between_nothing_and_all(q, k, v, raw):
    run = functional.logsigmoid(raw).cumsum(-1)
    return (scores(q, k) * differences(run).masked_fill(future(q), -math.inf).exp()) @ v


@spelling(PER_TOKEN)
def running_products_of_gates(q, k, v, raw):
    run = raw.sigmoid().cumprod(-1)
    return (scores(q, k) * (run[..., :, None] / run[..., None, :]).tril()) @ v


@spelling(PER_TOKEN)
def quotient_of_exponentials(q, k, v, steps):
    run = steps.cumsum(-1).exp()
    return (scores(q, k) * (run[..., :, None] / run[..., None, :]).tril()) @ v


@spelling(PER_TOKEN)
def running_sums_given(q, k, v, sums):
    return (scores(q, k) * differences(sums).masked_fill(future(q), -math.inf).exp()) @ v


@spelling(PER_TOKEN)
def running_sums_to_base_two(q, k, v, steps):
    return (scores(q, k) * torch.exp2(differences(steps.cumsum(-1)).masked_fill(future(q), -math.inf))) @ v


def rates_and_steps() -> tuple[Tensor, ...]:
    """q, k, v, rates (H,) and steps (B, H, S), both above 0."""
    return *plain()[:3], torch.rand(H), torch.rand(2, H, S)


@spelling(PER_TOKEN, rates_and_steps)
def a_rate_for_each_head_times_steps(q, k, v, rate, steps):
    exponent = -rate[:, None, None] * differences(steps.cumsum(-1))
    return (scores(q, k) * exponent.masked_fill(future(q), -math.inf).exp()) @ v


@spelling("scale=1 causal decay per token normalised(eps=0, floor=1.0)")
def gated_and_bounded(q, k, v, steps):  # Beck et al. 2024, arXiv:2405.04517, eq. 26, without the input gate
    weights = scores(q, k) * differences(steps.cumsum(-1)).masked_fill(future(q), -math.inf).exp()
    return (weights / torch.maximum(weights.sum(-1, keepdim=True).abs(), torch.ones(()))) @ v


@spelling(PER_TOKEN)
def a_gate_for_each_key_beside(q, k, v, steps):
    decay = differences(steps.cumsum(-1)).masked_fill(future(q), -math.inf).exp()
    return (scores(q, k) * (decay * steps.sigmoid()[..., None, :])) @ v


# Segment sums (state-spaces/mamba, modules/ssd_minimal.py): running sums under a triangle.


def segment_sums(steps: Tensor) -> Tensor:
    n = steps.shape[-1]
    before = torch.ones(n, n, dtype=torch.bool).tril(-1)
    sums = steps[..., None].expand(*steps.shape, n).masked_fill(~before, 0).cumsum(-2)
    return sums.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -math.inf)


@spelling(PER_TOKEN, state_space)
def state_space_duality(c, b, x, raw):
    rate = -torch.arange(1.0, H + 1).to(raw.dtype)
    steps = functional.softplus(raw)
    decay = segment_sums((steps * rate).transpose(1, 2)).exp()
    return torch.einsum("blhn,bshn,bhls,bshp->blhp", c, b, decay, x * steps[..., None])


@spelling(PER_TOKEN, state_space)  # transformers, models/mamba2/modeling_mamba2.py, before 5.0
def products_broadcast_and_summed(c, b, x, raw):
    decay = segment_sums(-functional.softplus(raw).transpose(1, 2)).exp()
    pairs = (c[:, :, None] * b[:, None]).sum(-1)
    weights = (pairs[..., None] * decay.permute(0, 2, 3, 1)[..., None]).sum(-1)
    return (weights[..., None] * x[:, None]).sum(2)


@spelling(PER_TOKEN, chunked_state_space)  # transformers, models/mamba2/modeling_mamba2.py
def each_chunk_by_itself(c, b, x, steps):
    pairs = torch.einsum("bclhn,bcshn->bclsh", c, b)
    weights = pairs * segment_sums(steps).exp().permute(0, 2, 3, 4, 1)
    return torch.einsum("bclsh,bcshp->bclhp", weights, x)


# Sums of broadcast products, and einsums that sum over nothing.


@spelling("scale=1 causal", plain)
def scores_and_values_broadcast(q, k, v, _):
    weights = (q[:, :, :, None] * k[:, :, None]).sum(-1).tril()
    return (weights[..., None] * v[:, :, None]).sum(-2)


@spelling("scale=0.5 full", plain)
def outer_products_summed(q, k, v, _):
    state = (0.5 * (k[..., :, None] * v[..., None, :])).sum(2)
    return (q[..., :, None] * state[:, :, None]).sum(-2)


@spelling("scale=1 causal decay per head", plain)
def weighed_by_an_einsum(q, k, v, slope):
    return torch.einsum("bhij,hij->bhij", scores(q, k), decay_of(slope, q)) @ v


@spelling("scale=1 full normalised(eps=1e-06, floor=None)", plain)
def divided_by_an_einsum(q, k, v, _):
    q, k = functional.elu(q) + 1, functional.elu(k) + 1
    inverse = 1 / (torch.einsum("bhnd,bhd->bhn", q, k.sum(2)) + 1e-6)
    return torch.einsum("bhne,bhn->bhne", q @ (k.mT @ v), inverse)


# Retention (Sun et al. 2023, arXiv:2307.08621).


@spelling("scale=1/tensor causal decay per head normalised(eps=0, floor=1.0, detached)", plain)
def retention_in_parallel(q, k, v, _):  # microsoft/torchscale, multiscale_retention.py and retnet.py
    rate = torch.log(1 - 2 ** (-5 - torch.arange(H, dtype=torch.float)))
    steps = distance(q).float()
    matrix = torch.masked_fill(steps, ~causal(q), float("inf"))
    matrix = torch.nan_to_num(torch.exp(matrix * rate[:, None, None]))
    matrix = matrix / matrix.sum(dim=-1, keepdim=True).sqrt()
    weights = scores(q, k) * matrix.to(q.dtype)
    return (weights / weights.detach().sum(dim=-1, keepdim=True).abs().clamp(min=1)) @ v


@spelling("scale=1 causal decay per head", plain)
def overflow_replaced_in_place(q, k, v, _):  # Jamie-Stirling/RetNet, retention.py
    n, m = (torch.arange(q.shape[2]).unsqueeze(d) for d in (1, 0))
    matrix = (0.97 ** (n - m)) * (n >= m).float()
    matrix[matrix != matrix] = 0  # NaN is what is sought
    return (scores(q, k) * matrix[None, None]) @ v


@spelling("scale=1 causal decay per head", plain)
def overflow_filled(q, k, v, _):
    matrix = (0.9 ** distance(q)) * causal(q)
    return (scores(q, k) * matrix.masked_fill(matrix.isnan(), 0.0)) @ v


def turned(x: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021, arXiv:2104.09864, eq. 34)."""
    angle = torch.arange(x.shape[2])[:, None] * 0.1
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


@spelling("scale=1 causal decay per head", plain)
def rotated_queries_and_keys(q, k, v, slope):
    return (scores(turned(q), turned(k)) * decay_of(slope, q)) @ v


@spelling("scale=1 causal", plain)
def queries_and_keys_scaled_by_position(q, k, v, _):  # xPos: Sun et al. 2022, arXiv:2212.10554
    at = torch.arange(q.shape[2])[:, None]
    return scores(turned(q) * 0.9**at, turned(k) * 0.9**-at).tril() @ v


# Normalisers.


@spelling("scale=1 causal normalised(eps=0, floor=1e-06, signed)", plain)
def divided_by_a_sum_bounded_with_its_sign(q, k, v, _):
    weights = scores(q.sigmoid(), k.sigmoid()).tril()
    return (weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)) @ v


@spelling("scale=1 causal decay per head normalised(eps=0, floor=1.0, detached)", plain)
def divided_by_a_detached_sum(q, k, v, slope):
    weights = scores(q, k) * decay_of(slope, q)
    return (weights / weights.detach().sum(-1, keepdim=True).abs().clamp(min=1)) @ v


@spelling("scale=1/tensor causal decay per head", plain)
def matrix_divided_by_its_own_rows(q, k, v, slope):
    matrix = decay_of(slope, q)
    return (scores(q, k) * (matrix / matrix.sum(-1, keepdim=True))) @ v


# Without order of time: pictures, and feature maps that are softmaxes themselves.


@spelling("scale=1 full", many_channels)  # CompVis/stable-diffusion, ldm/modules/attention.py
def keys_as_distributions(q, k, v):
    context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
    return torch.einsum("bhde,bhdn->bhen", context, q)


@spelling("scale=0.353553 full", many_channels)  # lucidrains/denoising-diffusion-pytorch
def with_keys_and_values_remembered(q, k, v):
    kept = torch.ones(1, H, D, 3, dtype=q.dtype).expand(q.shape[0], -1, -1, -1)
    k, v = torch.cat((kept, k), -1), torch.cat((kept * 0.5, v), -1)
    context = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
    return torch.einsum("bhde,bhdn->bhen", context, q.softmax(-2) * D**-0.5)


@spelling("scale=1 full", many_channels)  # mit-han-lab/efficientvit; NVlabs/Sana
def a_row_of_ones_beside_the_values(q, k, v):
    q, k, v = q.relu(), k.relu(), functional.pad(v, (0, 0, 0, 1), value=1.0)
    out = (v @ k.mT) @ q
    return out[:, :, :-1] / (out[:, :, -1:] + 1e-15)


@spelling("scale=1 full", plain)  # timm, models/coat.py
def softmax_over_the_keys(q, k, v, _):
    return D**-0.5 * (q @ (k.softmax(dim=2).mT @ v))


@spelling("scale=0.0625 full normalised", plain)  # lucidrains/performer-pytorch; arXiv:2009.14794, eq. 7
def random_features(q, k, v, _):
    directions = torch.arange(16.0 * D, dtype=q.dtype).view(16, D).sin()

    def features(x: Tensor) -> Tensor:
        projected = torch.einsum("...id,jd->...ij", D**-0.25 * x, directions)
        return 16**-0.5 * (torch.exp(projected - projected.amax((-1, -2), keepdim=True).detach()) + 1e-4)

    q, k = features(q), features(k)
    inverse = 1.0 / torch.einsum("...nd,...d->...n", q, k.sum(dim=-2))
    return torch.einsum("...de,...nd,...n->...ne", torch.einsum("...nd,...ne->...de", k, v), q, inverse)


@spelling("scale=1 causal decay per head", plain)
def gated_afterwards(q, k, v, slope):
    return ((scores(q, k) * decay_of(slope, q)) @ v) * v.sigmoid()
