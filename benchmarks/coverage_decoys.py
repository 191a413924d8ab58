"""Softmaxes that are no attention, or not only: a rewrite of one of these is an error, whatever it computes."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

B, H, S, D, EXPERTS = 2, 4, 20, 16, 8


def _heads() -> dict[str, Tensor]:
    return {name: torch.randn(B, H, S, D) for name in ("q", "k", "v")}


def _mixed() -> dict[str, Tensor]:
    return {**_heads(), "mix": torch.randn(H, H)}


def _tokens() -> dict[str, Tensor]:
    return {
        "x": torch.randn(B, S, D),
        "router": torch.randn(D, EXPERTS),
        "experts": torch.randn(EXPERTS, D, D),
    }


def router_of_all_experts(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    """A soft mixture: every expert weighed by the gate."""
    gates = (x @ router).softmax(-1)
    return torch.einsum("bse,bseo->bso", gates, torch.einsum("bsd,edo->bseo", x, experts))


def router_of_two_experts(x: Tensor, router: Tensor, experts: Tensor) -> Tensor:
    """Top-2 gates, as in Mixtral."""
    gates, chosen = (x @ router).softmax(-1).topk(2, dim=-1)
    gates = gates / gates.sum(-1, keepdim=True)
    dense = torch.zeros(*x.shape[:2], EXPERTS).scatter(-1, chosen, gates)
    return torch.einsum("bse,bseo->bso", dense, torch.einsum("bsd,edo->bseo", x, experts))


def softmax_over_channels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Gates over features, as in squeeze-and-excitation."""
    return v * (q * k).softmax(-1)


def talking_heads_before(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
    """Shazeer et al. 2020 (arXiv:2003.02436): heads mixed between the scores and the softmax."""
    return torch.einsum("bhij,hg->bgij", q @ k.mT, mix).softmax(-1) @ v


def talking_heads_after(q: Tensor, k: Tensor, v: Tensor, mix: Tensor) -> Tensor:
    """The same, between the softmax and the values."""
    return torch.einsum("bhij,hg->bgij", (q @ k.mT).softmax(-1), mix) @ v


def heads_summed_before_the_values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights of all heads averaged, then applied."""
    return (q @ k.mT).softmax(-1).mean(1, keepdim=True) @ v


def softmax_over_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Normalised along another dimension than the one that is summed."""
    return (q @ k.mT).softmax(1) @ v


def weights_of_another_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Weights times weights: two steps of a walk."""
    weights = (q @ k.mT).softmax(-1)
    return weights @ weights @ v


def largest_weights_only(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Top-4 of the weights, not normalised again."""
    weights = (q @ k.mT).softmax(-1)
    kept = weights >= weights.topk(4, dim=-1).values[..., -1:]
    return (weights * kept) @ v


DECOYS: Mapping[str, tuple[Callable[..., Tensor], Callable[[], dict[str, Tensor]]]] = {
    "router of all experts": (router_of_all_experts, _tokens),
    "router of two experts": (router_of_two_experts, _tokens),
    "softmax over channels": (softmax_over_channels, _heads),
    "talking heads before the softmax": (talking_heads_before, _mixed),
    "talking heads after the softmax": (talking_heads_after, _mixed),
    "heads averaged before the values": (heads_summed_before_the_values, _heads),
    "softmax over heads": (softmax_over_heads, _heads),
    "weights times weights": (weights_of_another_product, _heads),
    "largest weights only": (largest_weights_only, _heads),
}
