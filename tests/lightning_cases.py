"""Linear attention as it is defined, token by token, and random instances of it: what the lightning tests share."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """The arguments of causal linear attention, and the gradients that arrive at its two results."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    scale: float
    d_out: Tensor
    d_state: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> "Case":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return Case(**{name: change(x) if isinstance(x, Tensor) else x for name, x in values.items()})

    def on(self, device: str) -> "Case":
        return self.map(lambda x: x.to(device))

    def rows(self, start: int, stop: int | None) -> "Case":
        """Tokens start..stop, with the same initial state."""
        part = slice(start, stop)
        log_decay = self.log_decay
        if log_decay is not None and log_decay.dim() == 3:
            log_decay = log_decay[:, :, part]
        cut = {name: getattr(self, name)[:, :, part] for name in ("q", "k", "v", "d_out")}
        return replace(self, **cut, log_decay=log_decay)

    def in_rounded(self, dtype: torch.dtype) -> "Case":
        """The same numbers (already representable) in `dtype`; states and decays in fp32, fp64 if dtype is."""
        wide = torch.promote_types(dtype, torch.float32)
        narrow = {name: getattr(self, name).to(dtype) for name in ("q", "k", "v", "d_out")}
        return replace(self.map(lambda x: x.to(wide)), **narrow)


def recurrence(case: Case) -> Result:
    """S_t = exp(g_t) S_{t-1} + k_t^T v_t and o_t = scale q_t S_t, in the dtype of q; differentiable."""
    share = case.q.shape[1] // max(case.k.shape[1], 1)
    k, v = (x.repeat_interleave(share, dim=1) for x in (case.k, case.v))
    state = case.initial_state
    if state is None:
        state = case.q.new_zeros(case.q.shape[0], case.q.shape[1], k.shape[3], v.shape[3])
    out = []
    for t in range(case.q.shape[2]):
        if case.log_decay is not None:
            g = case.log_decay if case.log_decay.dim() == 1 else case.log_decay[:, :, t]
            state = g.exp()[..., None, None].to(state.dtype) * state
        state = state + (k[:, :, t, :, None] * v[:, :, t, None, :]).to(state.dtype)
        out.append(case.scale * (case.q[:, :, t, None].to(state.dtype) @ state)[:, :, 0])
    rows = torch.stack(out, dim=2) if out else case.q.new_zeros((*case.q.shape[:3], v.shape[3]))
    return rows.to(case.q.dtype), state


def quadratic(case: Case) -> Result:
    """The same as people spell it: N x N products in the dtype of q, with a matrix of decays."""
    share = case.q.shape[1] // max(case.k.shape[1], 1)
    k, v = (x.repeat_interleave(share, dim=1) for x in (case.k, case.v))
    run = _running_decay(case)
    future = torch.ones(run.shape[-1], run.shape[-1], dtype=torch.bool, device=run.device).triu(1)
    pairs = (run[..., :, None] - run[..., None, :]).masked_fill(future, -torch.inf).exp()
    out = case.scale * ((case.q @ k.mT) * pairs.to(case.q.dtype)) @ v
    until = (run[..., -1:] - run).exp()[..., None]
    state = ((k * until.to(k.dtype)).mT @ v).to(run.dtype)
    if case.initial_state is not None:
        entering = run.exp()[..., None].to(case.q.dtype) * (case.q @ case.initial_state.to(case.q.dtype))
        out = out + case.scale * entering
        state = state + run[..., -1:, None].exp() * case.initial_state
    return out, state


def _running_decay(case: Case) -> Tensor:
    batch, heads, length = case.q.shape[:3]
    wide = torch.promote_types(case.q.dtype, torch.float32)
    if case.log_decay is None:
        return torch.zeros(batch, heads, length, dtype=wide, device=case.q.device)
    if case.log_decay.dim() == 3:
        return case.log_decay.to(wide).cumsum(-1)
    steps = torch.arange(1, length + 1, device=case.q.device, dtype=wide)
    return (case.log_decay.to(wide)[:, None] * steps).expand(batch, heads, length)


def gradients(compute: Callable[[Case], Result], case: Case) -> dict[str, Tensor]:
    """Gradients of <o, d_out> + <state, d_state> in every tensor argument, by autograd."""
    names = [n for n in ("q", "k", "v", "log_decay", "initial_state") if getattr(case, n) is not None]
    leaves = {name: getattr(case, name).detach().requires_grad_() for name in names}
    results = zip(compute(replace(case, **leaves)), (case.d_out, case.d_state), strict=True)
    reached = [(x, d) for x, d in results if x.requires_grad]  # an empty sequence reaches nothing
    outputs, arriving = (
        zip(*reached, strict=True) if reached else ((next(iter(leaves.values())),), (case.q * 0,))
    )
    found = torch.autograd.grad(
        outputs, list(leaves.values()), arriving, allow_unused=True, materialize_grads=True
    )
    return dict(zip(names, found, strict=True))


def make_case(
    length: int,
    *,
    batch: int = 2,
    kv_heads: int = 1,
    share: int = 2,
    d: int = 8,
    dv: int = 8,
    decay: str = "head",
    rate: float = 0.3,
    with_state: bool = True,
    scale: float = 0.5,
    signed: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Case:
    """A random case, its numbers representable in `dtype`, held in fp64.

    rate: the strongest |log decay|. signed: normal numbers; else between 1/2 and 3/2, where nothing cancels.
    """
    heads = kv_heads * share

    def values(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        x = torch.randn(shape) if signed else torch.rand(shape) + 0.5
        return x.to(dtype).double()

    decay_shape = {"none": None, "head": (heads,), "token": (batch, heads, length)}[decay]
    log_decay = None if decay_shape is None else (-rate * torch.rand(decay_shape)).double()  # fp32 numbers
    state = values(batch, heads, d, dv, dtype=torch.float32) if with_state else None
    return Case(
        values(batch, heads, length, d),
        values(batch, kv_heads, length, d),
        values(batch, kv_heads, length, dv),
        log_decay,
        state,
        scale,
        values(batch, heads, length, dv),
        values(batch, heads, d, dv, dtype=torch.float32),
    )


#: Memory layouts of the same numbers; each differs from a contiguous tensor of rank >= 3 in its strides.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns first": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "sliced": lambda x: x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7.0)[..., 1::2].copy_(x),
    "padded": lambda x: x.new_full((*x.shape[:-1], x.shape[-1] + 3), 7.0)[..., 2:-1].copy_(x),
}


@st.composite
def cases(draw: st.DrawFn, longest: int = 40, *, shortest: int = 0, signed: bool = True) -> Case:
    """Any causal case: lengths from 0, widths from 1, shared heads, all decays, with and without a state."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    return make_case(
        draw(st.integers(shortest, longest)),
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        share=draw(st.integers(1, 3)),
        d=draw(st.sampled_from([1, 3, 8, 17])),
        dv=draw(st.sampled_from([1, 4, 7, 16])),
        decay=draw(st.sampled_from(["none", "head", "token"])),
        rate=draw(st.sampled_from([0.0, 0.05, 1.0, 20.0])),
        with_state=draw(st.booleans()),
        scale=draw(st.sampled_from([1.0, 0.25, -1.0, 0.0])),
        signed=signed,
    )
