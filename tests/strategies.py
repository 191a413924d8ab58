"""Random softmax attention: what is computed (`Meaning`) apart from how it is written down (`Writing`)."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

NEG_INF = float("-inf")


@dataclass(frozen=True)
class Meaning:
    """Sizes, scale, and which of a mask, padding, bias and soft cap there are."""

    batch: int = 2
    kv_heads: int = 2
    share: int = 1
    sq: int = 5
    sk: int = 5
    d: int = 8
    dv: int = 6
    scale: float = 0.25
    causal: bool = False
    padding: bool = False
    bias: bool = False
    softcap: float | None = None

    def inputs(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """q (B, H, Sq, D), k (B, Hkv, Sk, D), v (B, Hkv, Sk, Dv), keep (B, Sk) bool, bias (H, Sq, Sk)."""
        generator = torch.Generator().manual_seed(3)
        heads = self.kv_heads * self.share
        shapes = (
            (self.batch, heads, self.sq, self.d),
            (self.batch, self.kv_heads, self.sk, self.d),
            (self.batch, self.kv_heads, self.sk, self.dv),
            (heads, self.sq, self.sk),
        )
        q, k, v, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
        keep = torch.rand(self.batch, self.sk, generator=generator) > 0.3
        return q, k, v, keep, bias


@dataclass(frozen=True)
class Writing:
    """scale_on: q, k, scores, both (a root on each), late (after the mask). scale_by: mul, div, tensor.

    mask_by: added, masked_fill, where. product: matmul, einsum, bmm, turned (keys times queries). commuted: operands of
    sums and products change places. heads_by: expand, interleave. noise: views and casts that do nothing, by the place
    at which they stand.
    """

    scale_on: str = "scores"
    scale_by: str = "mul"
    mask_by: str = "masked_fill"
    product: str = "matmul"
    commuted: bool = False
    heads_by: str = "expand"
    noise: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Attention:
    """One attention as a function of the tensors of `meaning.inputs()`."""

    meaning: Meaning
    writing: Writing = Writing()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
        m, w = self.meaning, self.writing
        q, k, v = self._noisy("q", q), self._noisy("k", k), self._noisy("v", v)
        on_q, on_k, on_scores = _scales(m.scale, w.scale_on)
        q, k = self._scaled(q, on_q), self._scaled(k, on_k)
        k, v = self._repeated(k), self._repeated(v)
        scores = self._scaled(self._noisy("scores", self._product(q, k)), on_scores)
        if m.softcap is not None:
            scores = self._scaled(torch.tanh(scores / m.softcap), m.softcap)
        if m.bias:
            scores = bias + scores if w.commuted else scores + bias
        weights = self._noisy("weights", self._hidden(scores, keep).softmax(-1))
        return torch.einsum("bhij,bhjd->bhid", weights, v) if w.product == "einsum" else weights @ v

    def _scaled(self, x: Tensor, factor: float) -> Tensor:
        if factor == 1.0:
            return x
        if self.writing.scale_by == "div":
            return x / (1.0 / factor)
        by = torch.full((), factor, dtype=x.dtype) if self.writing.scale_by == "tensor" else factor
        return by * x if self.writing.commuted else x * by

    def _repeated(self, x: Tensor) -> Tensor:
        n = self.meaning.share
        if n == 1:
            return x
        if self.writing.heads_by == "interleave":
            return x.repeat_interleave(n, dim=1)
        b, h, s, d = x.shape
        return x[:, :, None].expand(b, h, n, s, d).reshape(b, h * n, s, d)

    def _product(self, q: Tensor, k: Tensor) -> Tensor:
        match self.writing.product:
            case "einsum":
                return torch.einsum("bhid,bhjd->bhij", q, k)
            case "turned":
                return (k @ q.transpose(-1, -2)).transpose(-1, -2)
            case "bmm":
                product = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2))
                return product.view(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        return torch.matmul(q, k.mT)

    def _hidden(self, scores: Tensor, keep: Tensor) -> Tensor:
        m = self.meaning
        if not (m.causal or m.padding):
            return scores
        seen = torch.ones(m.sq, m.sk, dtype=torch.bool).tril(m.sk - m.sq) if m.causal else None
        if m.padding:
            kept = keep[:, None, None, :]
            seen = kept if seen is None else (kept & seen if self.writing.commuted else seen & kept)
        match self.writing.mask_by:
            case "where":
                return torch.where(seen, scores, NEG_INF)
            case "added":
                mask = torch.zeros(seen.shape, dtype=scores.dtype).masked_fill(~seen, NEG_INF)
                return mask + scores if self.writing.commuted else scores + mask
        return scores.masked_fill(seen.logical_not(), NEG_INF)

    def _noisy(self, place: str, x: Tensor) -> Tensor:
        for where, noise in self.writing.noise:
            if where == place:
                x = NOISE[noise](x)
        return x


def _scales(scale: float, place: str) -> tuple[float, float, float]:
    """The factors on queries, keys and scores."""
    match place:
        case "q":
            return scale, 1.0, 1.0
        case "k":
            return 1.0, scale, 1.0
        case "both":
            return scale**0.5, scale**0.5, 1.0
    return 1.0, 1.0, scale


#: What changes no element and no meaning.
NOISE = {
    "turned twice": lambda x: x.transpose(-1, -2).transpose(-1, -2),
    "moved and back": lambda x: x.permute(2, 0, 3, 1).permute(1, 3, 0, 2),
    "one more dimension": lambda x: x.unsqueeze(2).squeeze(2),
    "packed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "flat and back": lambda x: x.reshape(-1, x.shape[-1]).view(x.shape),
    "folded": lambda x: x.flatten(0, 1).unflatten(0, (x.shape[0], x.shape[1])),
    "cast to what it is": lambda x: x.to(x.dtype),
    "copied": lambda x: x.clone(),
    "expanded to what it is": lambda x: x.expand(x.shape),
    "dropout in eval": lambda x: torch.nn.functional.dropout(x, 0.3, training=False),
    "repeated once": lambda x: x.repeat(1, 1, 1, 1),
}

meanings = st.builds(
    Meaning,
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    share=st.sampled_from([1, 1, 2, 3]),
    sq=st.integers(1, 6),
    sk=st.integers(2, 7),
    d=st.sampled_from([1, 4, 8]),
    dv=st.sampled_from([1, 3, 8]),
    scale=st.sampled_from([0.25, 1.0, 0.3, 2.0]),
    causal=st.booleans(),
    padding=st.booleans(),
    bias=st.booleans(),
    softcap=st.sampled_from([None, None, 5.0]),
)


def writings(**fixed: object) -> st.SearchStrategy[Writing]:
    """Ways to write an attention down; `fixed` fields are as given."""
    places = st.sampled_from(["q", "k", "v", "scores", "weights"])
    drawn = {
        "scale_on": st.sampled_from(["q", "k", "scores", "both"]),
        "scale_by": st.sampled_from(["mul", "div", "tensor"]),
        "mask_by": st.sampled_from(["added", "masked_fill", "where"]),
        "product": st.sampled_from(["matmul", "einsum", "bmm", "turned"]),
        "commuted": st.booleans(),
        "heads_by": st.sampled_from(["expand", "interleave"]),
        "noise": st.lists(st.tuples(places, st.sampled_from(sorted(NOISE))), max_size=3).map(tuple),
    }
    return st.builds(Writing, **{**drawn, **{name: st.just(value) for name, value in fixed.items()}})


def plainly(meaning: Meaning) -> Attention:
    """The attention written in the plainest way."""
    return Attention(meaning)
