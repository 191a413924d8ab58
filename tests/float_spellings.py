"""Attention whose numbers a module holds as floats: with dynamic=True Dynamo makes symbols of them."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import elu

Attend = Callable[["Held", Tensor, Tensor, Tensor], Tensor]


class Held(nn.Module):
    """An attention that reads two numbers of its own."""

    def __init__(self, attend: Attend, a: float, b: float = 1.0) -> None:
        super().__init__()
        self.attend, self.a, self.b = attend, a, b

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(self, q, k, v)


def qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 7, 8, generator=generator) for _ in range(3)]


def upper(q: Tensor, k: Tensor) -> Tensor:
    """What a causal mask hides."""
    return torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)


def soft_cap(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.mT * self.b / self.a) * self.a
    return scores.softmax(-1) @ v


def soft_cap_by_tensor(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    cap = torch.tensor(self.a)
    return (torch.tanh(q @ k.mT * self.b / cap) * cap).softmax(-1) @ v


def two_caps(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(q @ k.mT / self.a) * self.b).softmax(-1) @ v


def added_and_scaled(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shape = (q.shape[0] * q.shape[1], q.shape[2], k.shape[2])
    bias = torch.zeros(shape, dtype=q.dtype).masked_fill(upper(q, k), -torch.inf)
    scores = bias.baddbmm(q.flatten(0, 1), k.flatten(0, 1).mT, beta=self.b, alpha=self.a)
    return (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, q.shape[:2])


def filled(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(upper(q, k), self.a).softmax(-1) @ v


def filled_inside(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(upper(q, k), -1e30) / self.a).softmax(-1) @ v


def infinite_inside(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).masked_fill(upper(q, k), -torch.inf) * self.a).softmax(-1) @ v


def added_inside(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = q.new_zeros(q.shape[2], k.shape[2]).masked_fill(upper(q, k), -torch.inf)
    return ((q @ k.mT + hidden) * self.a).softmax(-1) @ v


def number_inside(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT + self.b) * self.a).masked_fill(upper(q, k), -1e30).softmax(-1) @ v


def term_times(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    hidden = q.new_zeros(q.shape[2], k.shape[2]).masked_fill(upper(q, k), -torch.inf)
    return torch.add(hidden, q @ k.mT, alpha=self.a).softmax(-1) @ v


def raised(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(upper(q, k), -torch.inf).clamp(min=self.a).softmax(-1) @ v


def cast_inside(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(upper(q, k), -1e30)
    return (scores.double() * self.a).softmax(-1).to(v.dtype) @ v


#: A spelling, its numbers, its spec; then numbers that it may come to hold, each with what is said of it then (None:
#: the graph is left alone).
Change = tuple[float, float, str | None]
SETTLED: dict[str, tuple[Attend, Sequence[Change]]] = {
    "soft cap": (
        soft_cap,
        [
            (5.0, 0.5, "softmax scale=0.5 full softcap=5"),
            (7.0, 0.5, "softmax scale=0.5 full softcap=7"),
            (7.0, 0.25, "softmax scale=0.25 full softcap=7"),
            (5.0, -0.5, "softmax scale=-0.5 full softcap=5"),
            (-5.0, 0.5, None),
        ],
    ),
    "soft cap in a tensor": (
        soft_cap_by_tensor,
        [
            (5.0, 0.5, "softmax scale=0.5 full softcap=5"),
            (7.0, 0.5, "softmax scale=0.5 full softcap=7"),
        ],
    ),
    "two caps": (
        two_caps,
        [
            (5.0, 5.0, "softmax scale=1 full softcap=5"),
            (5.0, 4.0, "softmax scale=0.8 full softcap=4"),
            (2.0, 4.0, "softmax scale=2 full softcap=4"),
            (2.0, 0.0, None),
        ],
    ),
    "baddbmm": (
        added_and_scaled,
        [
            (0.3, 1.0, "softmax scale=0.3 causal"),
            (0.4, 1.0, "softmax scale=0.4 causal"),
            (0.4, 2.0, "softmax scale=0.4 causal"),
            (0.4, -2.0, None),
        ],
    ),
    "fill": (
        filled,
        [
            (-1e9, 1.0, "softmax scale=1 causal"),
            (-1e30, 1.0, "softmax scale=1 causal"),
            (-1e3, 1.0, "softmax scale=1 causal hidden=-1000"),
            (3.0, 1.0, "softmax scale=1 causal hidden=3"),
        ],
    ),
    "fill inside a scale": (
        filled_inside,
        [
            (2.0, 1.0, "softmax scale=0.5 causal"),
            (4.0, 1.0, "softmax scale=0.25 causal"),
            (1e29, 1.0, "softmax scale=1e-29 causal hidden=-10"),
            (-2.0, 1.0, "softmax scale=-0.5 causal hidden=5e+29"),
        ],
    ),
    "infinity inside a scale": (
        infinite_inside,
        [(0.5, 1.0, "softmax scale=0.5 causal"), (0.25, 1.0, "softmax scale=0.25 causal"), (-0.5, 1.0, None)],
    ),
    "mask inside a scale": (
        added_inside,
        [
            (0.5, 1.0, "softmax scale=0.5 causal"),
            (0.25, 1.0, "softmax scale=0.25 causal"),
            (-0.5, 1.0, None),
        ],
    ),
    "number inside a scale": (
        number_inside,
        [
            (0.5, 3.0, "softmax scale=0.5 causal"),
            (0.25, 3.0, "softmax scale=0.25 causal"),
            (0.25, -4.0, "softmax scale=0.25 causal"),
            (0.25, -8e30, None),
        ],
    ),
    "scores times a number, added": (
        term_times,
        [(0.5, 1.0, "softmax scale=0.5 causal"), (0.25, 1.0, "softmax scale=0.25 causal")],
    ),
    "lower bound": (
        raised,
        [(-1e9, 1.0, "softmax scale=1 causal"), (-1e12, 1.0, "softmax scale=1 causal"), (-1.0, 1.0, None)],
    ),
    "cast inside a scale": (
        cast_inside,
        [
            (0.5, 1.0, "softmax scale=0.5 causal"),
            (0.25, 1.0, "softmax scale=0.25 causal"),
            (1e-25, 1.0, "softmax scale=1e-25 causal hidden=-100000"),
        ],
    ),
}


def where_low(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + torch.where(upper(q, k), self.a, 0.0)).softmax(-1) @ v


def one_minus_mask(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + (1.0 - (~upper(q, k)).to(q.dtype)) * self.a).softmax(-1) @ v


def full_and_triu(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT + torch.full((q.shape[2], k.shape[2]), self.a).triu(1)).softmax(-1) @ v


def near_in_distance(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    far = (torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])).abs() > self.a
    return (q @ k.mT).masked_fill(far, -torch.inf).softmax(-1) @ v


def weights_times(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT).softmax(-1) * self.a / self.b) @ v


def scaled_before_and_after(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT * self.a).softmax(-1) * self.a) @ v


def capped_and_weighed(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((torch.tanh(q @ k.mT / self.a) * self.a).softmax(-1) * self.a) @ v


def output_times(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v * self.a


def by_hand(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT * 0.1).exp()
    return weights @ v / (weights.sum(-1, keepdim=True) + self.a)


def constant_sink(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores = torch.cat([scores, torch.full_like(scores[..., :1], self.a)], -1)
    return scores.softmax(-1)[..., :-1] @ v


def normalised(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = ((elu(q) + 1) @ (elu(k) + 1).mT).tril()
    return weights @ v / (weights.sum(-1, keepdim=True) + self.a)


def floored(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = ((elu(q) + 1) @ (elu(k) + 1).mT).tril()
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=self.a)


def on_the_right(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = elu(q) + 1, elu(k) + 1
    return (q @ (k.mT @ v)) / (q @ k.sum(-2, keepdim=True).mT + self.a)


def decaying(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    return (q @ k.mT * torch.where(distance >= 0, self.a**distance, 0.0)) @ v


def linear_by_baddbmm(self: Held, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    nothing = q.new_zeros(q.shape[0] * q.shape[1], q.shape[2], k.shape[2])
    weights = torch.baddbmm(nothing, q.flatten(0, 1), k.flatten(0, 1).mT, beta=0, alpha=self.a).tril()
    return (weights @ v.flatten(0, 1)).unflatten(0, q.shape[:2])


#: A spelling, and values that its number takes one after the other; with the first it is rewritten.
FOLLOWED: dict[str, tuple[Attend, Sequence[float]]] = {
    "low where hidden": (where_low, (-1e9, -1e30, -3.0)),
    "one minus the mask": (one_minus_mask, (-1e9, -3.0)),
    "full and triu": (full_and_triu, (-1e30, -3.0)),
    "a distance": (near_in_distance, (2.5, 1.5, -1.0)),
    "weights times a number": (weights_times, (2.0, -0.5)),
    "one number before and after": (scaled_before_and_after, (0.5, 2.0)),
    "output times a number": (output_times, (2.0, -0.5)),
    "epsilon by hand": (by_hand, (1e-6, 0.5, -0.5)),
    "constant sink": (constant_sink, (0.5, 3.0)),
    "normaliser": (normalised, (1e-6, 0.5)),
    "normaliser with a floor": (floored, (1e-6, 9.0)),
    "right product": (on_the_right, (1e-6, 0.5)),
    "decay": (decaying, (0.9, 0.5, 1.5)),
    "linear baddbmm": (linear_by_baddbmm, (0.3, 2.0)),
}
