"""Streaming attention tests share these: random calls, their plain definition in any dtype, and layouts."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from hypothesis import strategies as st
from oracle import BITS
from torch import Tensor

from attnopt.kernels.streaming.problem import Problem
from attnopt.kernels.streaming.reach import reach

LAYOUTS = ("plain", "transposed", "sliced", "expanded")
VALUES = ("random", "equal", "one-hot", "needles", "large")
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class Structure:
    """The part of a mask that follows from positions."""

    offset: int | None = None
    window: int | None = None
    sinks: int = 0
    prefix: int = 0

    def dense(self, sq: int, sk: int) -> Tensor:
        """bool (Sq, Sk), straight from the definition."""
        i, j = torch.arange(sq)[:, None], torch.arange(sk)[None]
        seen = torch.ones(sq, sk, dtype=torch.bool) if self.offset is None else j <= i + self.offset
        if self.offset is not None and self.window is not None:
            seen = seen & ((j > i + self.offset - self.window) | (j < self.sinks))
        return seen | (j < self.prefix)


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call of the op."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    key_padding: Tensor | None = None
    sink_logits: Tensor | None = None
    slopes: Tensor | None = None
    scale: float = 0.3
    structure: Structure = Structure()
    softcap: float | None = None
    empty_row: str = "nan"
    diagonal: int = 0
    symmetric: bool = False

    @property
    def arguments(self) -> tuple[Any, ...]:
        """In the order of the op's schema."""
        s = self.structure
        tensors = (self.q, self.k, self.v, self.bias, self.mask, self.key_padding, self.sink_logits)
        numbers = (self.scale, s.offset, s.window, s.sinks, s.prefix, self.softcap, self.empty_row)
        return (*tensors, *numbers, self.slopes, self.diagonal, self.symmetric)

    @property
    def problem(self) -> Problem:
        """As both paths take it."""
        s, rows, columns = self.structure, self.q.shape[2], self.k.shape[2]
        where = reach(
            offset=s.offset, window=s.window, sinks=s.sinks, prefix=s.prefix, rows=rows, columns=columns
        )
        line = (self.slopes, self.diagonal, self.symmetric)
        return Problem(*self.arguments[:7], self.scale, where, self.softcap, self.empty_row, *line)

    def to(self, to: torch.dtype | str) -> "Call":
        """With the float tensors in a dtype, or all tensors on a device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)[:8]}
        moved = {
            name: x.detach().to(to)
            for name, x in tensors.items()
            if x is not None and (isinstance(to, str) or x.is_floating_point())
        }
        return replace(self, **moved)

    def plain(self) -> Tensor:
        """The definition, with all scores at once, in the dtype of the tensors and on the CPU."""
        c = self.to("cpu") if self.q.is_cuda else self
        if c.k.shape[2] == 0:
            return c.q.new_zeros((*c.q.shape[:3], c.v.shape[3]))
        v = c.v.repeat_interleave(c.q.shape[1] // max(1, c.k.shape[1]), dim=1)
        return c._filled(c.weights() @ v, v, torch.isneginf(c._logits()).all(-1, keepdim=True))

    def weights(self) -> Tensor:
        """softmax, (B, H, Sq, Sk); zero in rows that see no key."""
        logits = self._logits()
        empty = torch.isneginf(logits).all(-1, keepdim=True)
        return self._softmax(logits.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)

    def _logits(self) -> Tensor:
        k = self.k.repeat_interleave(self.q.shape[1] // max(1, self.k.shape[1]), dim=1)
        scores = (self.q @ k.mT) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        if self.bias is not None:
            scores = scores + self.bias.to(scores.dtype)
        if self.slopes is not None:
            scores = scores + (self.slopes[..., None, None] * self.distance()).to(scores.dtype)
        return scores.masked_fill(~self.visible(), -torch.inf)

    def distance(self) -> Tensor:
        """What the slopes multiply, (Sq, Sk): whole numbers."""
        i, j = torch.arange(self.q.shape[2])[:, None], torch.arange(self.k.shape[2])[None]
        away = j - i - self.diagonal
        return -away.abs() if self.symmetric else away

    def visible(self) -> Tensor:
        """bool, broadcastable to (B, H, Sq, Sk)."""
        seen = self.structure.dense(self.q.shape[2], self.k.shape[2])[None, None]
        for x in (self.mask, None if self.key_padding is None else self.key_padding[:, None, None]):
            seen = seen if x is None else seen & x
        return seen

    def _softmax(self, logits: Tensor) -> Tensor:
        if self.sink_logits is None:
            return logits.softmax(-1)
        z = self.sink_logits.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, z], -1).softmax(-1)[..., :-1]

    def _filled(self, o: Tensor, v: Tensor, empty: Tensor) -> Tensor:
        if self.sink_logits is not None:
            empty = empty & torch.isneginf(self.sink_logits)[None, :, None, None]
        if self.empty_row == "uniform":
            return torch.where(empty, v.mean(2, keepdim=True), o)
        return o if self.empty_row == "zero" else o.masked_fill(empty, torch.nan)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x in another memory layout; "expanded" takes the first head for all."""
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        return torch.stack([x, x + 1], dim=-1).flatten(-2)[..., ::2]
    if layout == "expanded":
        return x[:, :1].expand(x.shape)
    return x.contiguous()


def values(kind: str, *shape: int) -> Tensor:
    """Numbers of one family; "large" ones make logits of +-1e4 that are exact in fp32."""
    x = torch.randn(shape)
    if kind == "equal":
        return torch.full(shape, 0.7)
    if kind == "one-hot":
        return (x == x.amax(-1, keepdim=True)).float() if x.numel() else x
    if kind == "needles":
        return torch.where(torch.rand(shape) < 0.02, 300 * x, x)
    return (60 * x).round() if kind == "large" else x


def call(
    *,
    batch: int = 2,
    kv_heads: int = 2,
    group: int = 1,
    sq: int = 33,
    sk: int = 33,
    d: int = 16,
    dv: int = 16,
    kind: str = "random",
    layout: str = "plain",
    extras: frozenset[str] = frozenset(),
    seed: int = 0,
    **rest: Any,
) -> Call:
    """A random call. `extras` names what else is there: bias, -inf, lowest, mask, padding, sinks, softcap, alibi."""
    torch.manual_seed(seed)
    q = values(kind, batch, kv_heads * group, sq, d)
    k = values(kind, batch, kv_heads, sk, d)
    v = values("random" if kind == "large" else kind, batch, kv_heads, sk, dv) + (2.0 if dv < 8 else 0.0)
    rest = {"scale": 1.0 if kind == "large" else 0.3, **rest}
    return Call(*(laid_out(x, layout) for x in (q, k, v)), **_extras(extras, q, k, seed), **rest)


def _extras(extras: frozenset[str], q: Tensor, k: Tensor, seed: int) -> dict[str, Any]:
    (batch, heads, sq, _), sk = q.shape, k.shape[2]
    shape = [(batch, heads, sq, sk), (1, heads, sq, sk), (batch, 1, 1, sk), (1, 1, sq, sk)][seed % 4]
    found: dict[str, Any] = {}
    if extras & {"bias", "-inf", "lowest"}:
        found["bias"] = torch.randn(shape)
        if extras & {"-inf", "lowest"}:
            fill = -torch.inf if "-inf" in extras else LOWEST
            found["bias"].masked_fill_(torch.rand(shape) < 0.4, fill)
            found["bias"][..., : sq // 3, :] = fill
    if "mask" in extras:
        found["mask"] = torch.rand(shape) < 0.6
    if "padding" in extras:
        found["key_padding"] = torch.rand(batch, sk) < 0.7
    if "sinks" in extras:
        found["sink_logits"] = torch.randn(heads)
    if "softcap" in extras:
        found["softcap"] = 2.0
    if "alibi" in extras:
        found |= {"slopes": torch.randn(1 + seed % 2 * (batch - 1), heads) * 0.3, "diagonal": seed % 7 - 3}
        found["symmetric"] = seed % 3 == 1
    return found


@st.composite
def structures(draw: st.DrawFn, *, reach: int = 20) -> Structure:
    offset = draw(st.none() | st.integers(-reach, reach))
    window = None if offset is None else draw(st.none() | st.integers(-1, reach))
    return Structure(offset, window, draw(st.integers(0, 5)), draw(st.sampled_from([0, 0, 1, 7])))


@st.composite
def calls(draw: st.DrawFn, *, longest: int = 40, widest: int = 20) -> Call:
    """Calls of every shape, structure, layout and extra."""
    extras = draw(
        st.sets(st.sampled_from(["bias", "-inf", "lowest", "mask", "padding", "sinks", "softcap", "alibi"]))
    )
    return call(
        batch=draw(st.integers(0, 2)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        sq=draw(st.integers(0, longest)),
        sk=draw(st.integers(0, longest)),
        d=draw(st.integers(1, widest)),
        dv=draw(st.integers(1, widest)),
        layout=draw(st.sampled_from(LAYOUTS)),
        extras=frozenset(extras),
        seed=draw(st.integers(0, 999)),
        scale=draw(st.sampled_from([0.0, -1.0, 0.3, 1.0, 8.0])),
        structure=draw(structures()),
        empty_row=draw(st.sampled_from(["nan", "zero", "uniform"])),
    )


def differentiable(c: Call) -> tuple[Call, list[Tensor]]:
    """The call with fresh leaves, and the leaves: q, k, v and whatever else has a gradient."""
    names = [
        name for name in ("q", "k", "v", "bias", "sink_logits", "slopes") if getattr(c, name) is not None
    ]
    leaves = {name: getattr(c, name).detach().clone().requires_grad_() for name in names}
    return replace(c, **leaves), list(leaves.values())


def plain_gradients(c: Call, do: Tensor) -> list[Tensor]:
    """Gradients of the definition; an empty row passes none back, whatever it returns, but the mean's."""
    finite = replace(c, empty_row="zero") if c.empty_row == "nan" else c
    finite, leaves = differentiable(finite)
    o = finite.plain()
    if not o.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    found = torch.autograd.grad(o, leaves, do, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def eager_rows(c: Call, exact: Tensor) -> Tensor:
    """The definition in the dtype of `c`; of several orders of the channels, the row that errs the most.

    The order changes nothing but how scores round: beside a large scale, one order may be lucky.
    """
    orders = [torch.randperm(c.q.shape[3]) for _ in range(8)]
    tries = torch.stack([replace(c, q=c.q[..., order], k=c.k[..., order]).plain() for order in orders])
    worst = (tries.double() - exact).norm(dim=-1, keepdim=True).nan_to_num(0.0).argmax(0, keepdim=True)
    return tries.take_along_dim(worst, 0)[0]


def eager_gradients(c: Call, do: Tensor, exact: list[Tensor]) -> list[Tensor]:
    """A yardstick for gradients in the dtype of `c`: as far from `exact`, row by row, as the definition in that dtype,
    but never nearer than one rounding of the terms that were summed: where they cancel, eager may be lucky.
    """
    eager, terms = plain_gradients(c, do), _terms(c.to(torch.float64), do.double())
    return [_moved(*row, 2.0 ** -BITS[c.q.dtype]) for row in zip(exact, eager, terms, strict=True)]


def _moved(exact: Tensor, eager: Tensor, terms: Tensor, rounding: float) -> Tensor:
    error = (eager.double() - exact).norm(dim=-1, keepdim=True)
    distance = torch.maximum(error, rounding * terms.norm(dim=-1, keepdim=True))
    return exact + distance * exact.shape[-1] ** -0.5


def _terms(c: Call, do: Tensor) -> list[Tensor]:
    """What the gradients of q, k, v, bias and sinks would be if no term had a sign."""
    group, kv_heads = c.q.shape[1] // c.k.shape[1], c.k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (c.k, c.v))
    p = c.weights().detach()
    dp = do @ v.mT
    delta = (do * (p @ v)).abs().sum(-1, keepdim=True)
    ds = p * (dp.abs() + delta)
    dk, dv = ds.mT @ c.q.abs() * abs(c.scale), p.mT @ do.abs()
    found = [ds @ k.abs() * abs(c.scale), *(x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))]
    if c.bias is not None:
        found.append(ds.sum_to_size(c.bias.shape))
    if c.sink_logits is not None:
        found.append(((1 - p.sum(-1, keepdim=True)) * delta).sum((0, 2, 3)))
    if c.slopes is not None:
        found.append((ds * c.distance().abs()).sum((-2, -1)).sum_to_size(c.slopes.shape))
    return found
