"""Laws of the algebra of linear attention: other layouts, products, scales, decays and casts give the same spec."""

import math
from dataclasses import dataclass

import torch
from compiling import check_like_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_gated_spellings import differences, future, segment_sums
from linear_spellings import causal, distance, scores
from torch import Tensor

B, H, S, D, DV = 2, 3, 13, 4, 5

Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

PRODUCTS = {
    "matmul": (scores, lambda w, v: w @ v),
    "einsum": (
        lambda q, k: torch.einsum("bhqd,bhkd->bhqk", q, k),
        lambda w, v: torch.einsum("bhkv,bhqk->bhqv", v, w),
    ),
    "broadcast": (
        lambda q, k: (k[:, :, None] * q[:, :, :, None]).sum(-1),
        lambda w, v: (w[..., None] * v[:, :, None]).sum(3),
    ),
    "folded": (
        lambda q, k: torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT).unflatten(0, (B, H)),
        lambda w, v: torch.bmm(w.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (B, H)),
    ),
}
LAYOUTS = {
    "heads first": lambda x: x,
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "tokens last": lambda x: x.mT.contiguous().mT,
    "merged": lambda x: x.transpose(1, 2).flatten(2).unflatten(2, (H, -1)).transpose(1, 2),
}
PER_HEAD = {
    "exponential": lambda x, rate, _: torch.exp(-rate[:, None, None] * distance(x)),
    "power": lambda x, rate, _: torch.exp(-rate)[:, None, None] ** distance(x),
    "logarithm": lambda x, rate, _: torch.exp((-rate).exp().log()[:, None, None] * distance(x)),
    "base two": lambda x, rate, _: torch.exp2(-rate.view(H, 1, 1) * distance(x)),
    "absolute": lambda x, rate, _: torch.exp(-(distance(x).abs() * rate[:, None, None])),
    "filled": lambda x, rate, _: torch.exp(
        (-rate[:, None, None] * distance(x)).masked_fill(future(x), -math.inf)
    ),
}
PER_TOKEN = {
    "differences": lambda x, _, g: differences(g.cumsum(-1)).masked_fill(future(x), -math.inf).exp(),
    "negated": lambda x, _, g: (-differences((-g).cumsum(-1))).masked_fill(future(x), -math.inf).exp(),
    "segments": lambda x, _, g: segment_sums(g).exp(),
    "quotient": lambda x, _, g: g.cumsum(-1).exp()[..., None] / g.cumsum(-1).exp()[..., None, :],
    "products": lambda x, _, g: g.exp().cumprod(-1)[..., None] / g.exp().cumprod(-1)[..., None, :],
}
DECAYS = {"none": lambda x, rate, g: x.new_ones(x.shape[2], x.shape[2]), **PER_HEAD, **PER_TOKEN}
MASKS = {
    "tril": lambda w: w.tril(),
    "where": lambda w: torch.where(causal(w), w, 0.0),
    "filled": lambda w: w.masked_fill(future(w), 0),
    "times": lambda w: causal(w) * w,
}
MUTANTS = {
    "one key more": lambda w: w.tril(1),
    "one key less": lambda w: w.tril(-1),
    "the other side": lambda w: w.triu(),
    "a window": lambda w: w.tril().triu(-3),
    "every other key": lambda w: w * (distance(w) % 2 == 0),
    "no mask": lambda w: w,
    "heads mixed": lambda w: w.tril().roll(1, dims=1),
    "turned": lambda w: w.tril().mT,
    "shifted": lambda w: w.tril().roll(1, dims=-1),
    "squared": lambda w: (w * w).tril(),
    "raised": lambda w: (w + 0.5).tril(),
}


@dataclass(frozen=True)
class Shuffle:
    """One spelling of causal linear attention with scale 0.5."""

    product: str
    layout: str
    decay: str
    mask: str
    scaled: str
    commuted: bool
    cast: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rate: Tensor, gates: Tensor) -> Tensor:
        q, k, v = map(LAYOUTS[self.layout], (q, k, v))
        halves = {name: 0.5 if name == self.scaled else 1.0 for name in ("q", "k", "v", "scores", "matrix")}
        first, last = PRODUCTS[self.product]
        matrix = DECAYS[self.decay](q, rate, gates) * halves["matrix"]
        found = first(q * halves["q"], halves["k"] * k) * halves["scores"]
        found = found.to(found.dtype) if self.cast else found
        weights = matrix.to(q.dtype) * found if self.commuted else found * matrix
        return last(self.masked(weights), v * halves["v"])

    def masked(self, weights: Tensor) -> Tensor:
        return MASKS[self.mask](weights)

    @property
    def spec(self) -> str:
        kind = (
            " decay per head"
            if self.decay in PER_HEAD
            else " decay per token"
            if self.decay in PER_TOKEN
            else ""
        )
        return f"linear scale=0.5 causal{kind}"


@dataclass(frozen=True)
class Mutant(Shuffle):
    """The same with another mask, or something else done to the weights."""

    change: str = "no mask"

    def masked(self, weights: Tensor) -> Tensor:
        return MUTANTS[self.change](weights)


def parts() -> list[st.SearchStrategy[object]]:
    names = (PRODUCTS, LAYOUTS, DECAYS, MASKS)
    return [*(st.sampled_from(list(n)) for n in names), st.sampled_from(["q", "k", "v", "scores", "matrix"]),
            st.booleans(), st.booleans()]  # fmt: skip


def inputs(seed: int) -> Inputs:
    torch.manual_seed(seed)
    q, k = torch.rand(B, H, S, D) + 0.1, torch.rand(B, H, S, D) + 0.1
    return q, k, torch.randn(B, H, S, DV), torch.rand(H) * 0.4 + 0.1, -torch.rand(B, H, S) * 0.5


@settings(max_examples=15)
@given(program=st.builds(Shuffle, *parts()), seed=st.integers(0, 9))
def test_every_spelling_of_one_attention_has_one_spec(program: Shuffle, seed: int) -> None:
    report = check_like_eager(program, inputs(seed), differentiable=3)
    assert [(site.verdict, site.spec) for site in report.attention] == [("rewritten", program.spec)]


@settings(max_examples=15)
@given(program=st.builds(Mutant, *parts(), change=st.sampled_from(sorted(MUTANTS))), seed=st.integers(0, 9))
def test_a_mutant_is_refused_or_right(program: Mutant, seed: int) -> None:
    report = check_like_eager(program, inputs(seed))
    served = [site.spec for site in report.attention if site.verdict == "rewritten"]
    assert program.spec not in served or program.change == "no mask"
    assert all(site.reason for site in report.attention if site.verdict == "refused")
