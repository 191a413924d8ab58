"""Laws of reading linear attention: any mix of spellings, sizes and dtypes is read, and nothing else in a model."""

from dataclasses import dataclass

import pytest
import torch
from compiling import check_like_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_spellings import causal, decay_of, distance, scores
from torch import Tensor, nn
from torch.nn import functional

import attnopt

MASKS = {
    "none": lambda w, q: w,
    "tril": lambda w, q: w.tril(),
    "filled": lambda w, q: w.masked_fill(~causal(q), 0.0),
    "where": lambda w, q: torch.where(distance(q) >= 0, w, 0.0),
    "times": lambda w, q: w * causal(q),
}
DECAYS = {
    "none": lambda w, q, rates: w,
    "exp": lambda w, q, rates: w * decay_of(rates, q).to(w.dtype),
    "power": lambda w, q, rates: torch.exp(-rates)[:, None, None] ** distance(q).clamp(min=0) * w,
}
NORMS = {
    "none": lambda w: (w, ""),
    "eps": lambda w: (w / (w.sum(-1, keepdim=True) + 1e-3), " normalised(eps=0.001, floor=None)"),
    "floor": lambda w: (w / w.sum(-1, keepdim=True).abs().clamp_min(1.0), " normalised(eps=0, floor=1.0)"),
}
SCALES = {
    "none": scores,
    "q": lambda q, k: scores(q * 0.5, k),
    "k": lambda q, k: scores(q, 0.5 * k),
    "scores": lambda q, k: scores(q, k) / 2,
}


@dataclass(frozen=True)
class Program:
    """One mix: how the scores are scaled, masked and decayed (in either order), and normalised."""

    scale: str
    mask: str
    decay: str
    norm: str
    decay_first: bool

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
        weights = SCALES[self.scale](q, k)
        if self.decay_first:
            weights = DECAYS[self.decay](weights, q, rates)
        weights = MASKS[self.mask](weights, q)
        if not self.decay_first:
            weights = DECAYS[self.decay](weights, q, rates)
        return NORMS[self.norm](weights)[0] @ v

    @property
    def spec(self) -> str:
        is_causal = self.mask != "none" or self.decay == "exp"
        return (
            f"linear scale={1 if self.scale == 'none' else 0.5} {'causal' if is_causal else 'full'}"
            f"{' decay per head' if self.decay != 'none' else ''}{NORMS[self.norm](torch.ones(1, 1))[1]}"
        )


programs = st.builds(
    Program,
    *map(st.sampled_from, (list(SCALES), list(MASKS), list(DECAYS), list(NORMS))),
    st.booleans(),
)


@settings(max_examples=20)
@given(
    program=programs,
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    length=st.integers(2, 70),
    width=st.integers(2, 9),
    seed=st.integers(0, 99),
)
def test_any_mix_is_read(
    program: Program, batch: int, heads: int, length: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    # Positive, so that no sum comes near 0.
    q, k = (torch.rand(batch, heads, length, width) + 0.1 for _ in range(2))
    inputs = (q, k, torch.randn(batch, heads, length, 5), torch.rand(heads) * 0.5)
    report = check_like_eager(program, inputs)
    found = [(site.verdict, site.spec) for site in report.attention]
    if program.mask == "none" and program.decay == "power":
        # Later keys weigh something too: no decay.
        assert "rewritten" not in [verdict for verdict, _ in found]
    elif batch == heads == 1 and program.spec.endswith("full"):
        # Two products of three matrices might be anything.
        assert found == []
    else:
        assert found == [("rewritten", program.spec)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_dtype_is_read(dtype: torch.dtype) -> None:
    inputs = (*(torch.rand(2, 3, 33, 8, dtype=dtype) for _ in range(3)), torch.rand(3))
    report = check_like_eager(Program("q", "filled", "exp", "floor", decay_first=True), inputs)
    assert [site.verdict for site in report.attention] == ["rewritten"]


class Mixed(nn.Module):
    """Two layers of linear attention and one of softmax attention, each with a feed-forward of two products."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.ModuleList(nn.Linear(32, 96) for _ in range(3))
        self.up = nn.ParameterList(torch.randn(32, 64) / 8 for _ in range(3))
        self.down = nn.ParameterList(torch.randn(64, 32) / 8 for _ in range(3))
        self.slopes = nn.Parameter(torch.tensor([0.5, 0.25]))

    def forward(self, x: Tensor) -> Tensor:
        for n in range(3):
            q, k, v = (
                y.unflatten(-1, (2, 16)).transpose(1, 2) for y in self.project[n](x.tanh()).chunk(3, -1)
            )
            weights = scores(q, k)
            weights = weights.softmax(-1) if n == 1 else weights * decay_of(self.slopes, q)
            x = x + (weights @ v).transpose(1, 2).flatten(2)
            y = x.tanh()
            x = x + (functional.silu(y @ self.up[n]) * (y @ self.up[n])) @ self.down[n]
        return x


def test_in_a_model_each_attention_is_found_once_and_nothing_else() -> None:
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(2, 11, 32)
    report = attnopt.explain(model, x)
    assert [site.family for site in report.sites] == ["linear", "softmax", "linear"]
    assert [site.kernel for site in report.sites] == ["lightning", "sdpa", "lightning"]
    assert all(site.module == "" and site.where.startswith("test_linear_laws.py:") for site in report.sites)


def test_slopes_and_weights_of_a_model_learn() -> None:
    torch.manual_seed(0)
    model, x = Mixed().double(), torch.randn(2, 11, 32, dtype=torch.float64)
    model(x).square().mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, backend="attnopt", options={"inner": "aot_eager"})(x).square().mean().backward()
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)
    assert float(expected["slopes"].abs().min()) > 0


def test_an_exported_program_is_read() -> None:
    torch.manual_seed(0)
    model, x = Mixed().double(), torch.randn(2, 11, 32, dtype=torch.float64)
    program, report = attnopt.rewrite(torch.export.export(model, (x,)))
    assert [site.verdict for site in report.attention] == ["rewritten"] * 3
    torch.testing.assert_close(program.module()(x), model(x))
