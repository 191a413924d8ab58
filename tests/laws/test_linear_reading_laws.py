"""How linear attention is written changes nothing of what is read: one meaning, one spec."""

from dataclasses import dataclass, replace

import torch
from graphs import site_of
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_spellings import causal, decay_of
from strategies import NOISE
from torch import Tensor

PLACES = ("q", "k", "v", "scores", "weights")


@dataclass(frozen=True)
class Writing:
    """scale_on: q, k, scores. mask_by: tril, times, filled. in_place: products overwrite the scores."""

    scale_on: str = "scores"
    mask_by: str = "tril"
    product: str = "matmul"
    in_place: bool = False
    commuted: bool = False
    decayed: bool = False
    noise: tuple[tuple[str, str], ...] = ()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
        q, k, v = (self._noisy(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
        q, k = q * 0.5 if self.scale_on == "q" else q, k * 0.5 if self.scale_on == "k" else k
        scores = torch.einsum("bhid,bhjd->bhij", q, k) if self.product == "einsum" else q @ k.mT
        scores = self._noisy("scores", scores)
        if self.scale_on == "scores":
            scores = self._times(scores, 0.5)
        if self.decayed:
            scores = self._times(scores, decay_of(rates, q))
        weights = self._noisy("weights", self._masked(scores, q))
        return torch.einsum("bhij,bhje->bhie", weights, v) if self.product == "einsum" else weights @ v

    def _times(self, scores: Tensor, by: float | Tensor) -> Tensor:
        if self.in_place:
            return scores.mul_(by)
        return by * scores if self.commuted else scores * by

    def _masked(self, scores: Tensor, q: Tensor) -> Tensor:
        match self.mask_by:
            case "times":
                return scores * causal(q)
            case "filled":
                return scores.masked_fill(~causal(q), 0.0)
        return scores.tril()

    def _noisy(self, place: str, x: Tensor) -> Tensor:
        for where, noise in self.noise:
            x = NOISE[noise](x) if where == place else x
        return x


writings = st.builds(
    Writing,
    *map(st.sampled_from, (["q", "k", "scores"], ["tril", "times", "filled"], ["matmul", "einsum"])),
    in_place=st.just(value=False),
    commuted=st.booleans(),
    decayed=st.booleans(),
    noise=st.lists(st.tuples(st.sampled_from(PLACES), st.sampled_from(sorted(NOISE))), max_size=2).map(tuple),
)


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(2, 3, 7, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    return (
        q,
        k,
        torch.randn(2, 3, 7, 5, generator=generator, dtype=torch.float64),
        torch.tensor([0.5, 0.25, 1.0]),
    )


@settings(max_examples=settings().max_examples // 2 + 1)
@given(writing=writings)
def test_any_writing_reads_like_the_plain_one(writing: Writing) -> None:
    plain = site_of(Writing(decayed=writing.decayed), *inputs()).spec
    read = site_of(writing, *inputs()).spec
    assert replace(read, precision=plain.precision) == plain


@given(scale_on=st.sampled_from(["q", "k", "scores"]), decayed=st.booleans())
@settings(max_examples=6)
def test_products_in_place_are_products(scale_on: str, *, decayed: bool) -> None:
    one, other = (Writing(scale_on, decayed=decayed, in_place=there) for there in (False, True))
    assert site_of(one, *inputs()).spec == site_of(other, *inputs()).spec
