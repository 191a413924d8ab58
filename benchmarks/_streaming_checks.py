"""Streaming attention on a GPU against fp64: the cases, and how far each row may be off.

Each row of the output within twice eager's own error in the same dtype, each gradient's rows within three times.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from attnopt.kernels.streaming import triton_backward, triton_forward
from attnopt.kernels.streaming.op import attend
from attnopt.kernels.streaming.problem import Problem
from attnopt.kernels.streaming.reach import reach

Row = dict[str, Any]

BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 20}


@dataclass(frozen=True)
class Shape:
    """One correctness case: sizes, structure, and which tensors come with it."""

    sq: int
    sk: int
    d: int = 128
    dv: int = 128
    batch: int = 1
    heads: int = 4
    kv_heads: int = 4
    offset: int | None = 0
    window: int | None = None
    sinks: int = 0
    prefix: int = 0
    extras: tuple[str, ...] = ()

    def visible(self) -> Tensor:
        """bool (Sq, Sk), from the definition."""
        i = torch.arange(self.sq, device="cuda")[:, None]
        j = torch.arange(self.sk, device="cuda")[None]
        seen = (i >= 0) & (j >= 0) if self.offset is None else j <= i + self.offset
        if self.offset is not None and self.window is not None:
            seen = seen & ((j > i + self.offset - self.window) | (j < self.sinks))
        return seen | (j < self.prefix)


CHECKS = (
    Shape(1, 2, offset=1),
    Shape(1, 1000, offset=999, window=300, sinks=4),
    Shape(257, 257),
    Shape(1000, 1000, offset=None),
    Shape(1000, 1000, window=200, sinks=4, heads=8, kv_heads=2),
    Shape(2048, 2048, window=1024, sinks=4, batch=2),
    Shape(2048, 2048, window=256, sinks=4, d=64, dv=64, heads=8),
    Shape(1500, 1500, window=100, sinks=4, d=256, dv=256),
    Shape(1500, 1500, window=100, sinks=40, d=80, dv=80),
    Shape(999, 999, window=2, d=40, dv=96),
    Shape(700, 1900, offset=1200, window=333, sinks=130, d=96, dv=96),
    Shape(1300, 1300, offset=-60, window=500, sinks=4),
    Shape(1200, 1200, prefix=300, d=64, dv=64),
    Shape(1111, 1111, window=200, sinks=4, extras=("padding",), batch=2),
    Shape(1111, 1111, window=200, sinks=4, extras=("mask",)),
    Shape(1111, 1111, extras=("bias",)),
    Shape(1111, 1111, window=200, sinks=4, extras=("softcap", "sink_logits")),
    Shape(
        600,
        600,
        d=16,
        dv=16,
        heads=6,
        kv_heads=3,
        extras=("bias", "mask", "padding", "softcap", "sink_logits"),
    ),
    Shape(640, 640, d=160, dv=200),
)


def arguments_of(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    """The arguments of the op, in the order of its schema."""
    torch.manual_seed(0)
    s, extras = shape, set(shape.extras)
    make = partial(torch.randn, device="cuda")
    q = make(s.batch, s.sq, s.heads, s.d).to(dtype).transpose(1, 2)
    k, v = (make(s.batch, s.kv_heads, s.sk, n).to(dtype) for n in (s.d, s.dv))
    bias = make(1, s.heads, s.sq, s.sk).to(dtype) if "bias" in extras else None
    mask = torch.rand(1, 1, s.sq, s.sk, device="cuda") < 0.7 if "mask" in extras else None
    keep = torch.rand(s.batch, s.sk, device="cuda") < 0.7 if "padding" in extras else None
    z = make(s.heads).to(dtype) if "sink_logits" in extras else None
    softcap = 20.0 if "softcap" in extras else None
    structure = (s.offset, s.window, s.sinks, s.prefix)
    return (q, k, v, bias, mask, keep, z, s.d**-0.5, *structure, softcap, "zero", None, 0, False)


def definition(shape: Shape, arguments: tuple[Any, ...]) -> Tensor:
    """All scores at once, in the dtype of the arguments; rows that see no key are zero."""
    (q, k, v, bias, mask, keep, z, scale), softcap = arguments[:8], arguments[12]
    k, v = (x.repeat_interleave(shape.heads // shape.kv_heads, dim=1) for x in (k, v))
    scores = q @ k.mT * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + bias
    seen = shape.visible()[None, None]
    seen = seen if mask is None else seen & mask
    seen = seen if keep is None else seen & keep[:, None, None]
    logits = scores.masked_fill(~seen, -torch.inf)
    sink = logits.new_full((), -torch.inf) if z is None else z[None, :, None, None].to(logits.dtype)
    logits = torch.cat([logits, sink.expand(*logits.shape[:-1], 1)], -1)
    empty = torch.isneginf(logits).all(-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).softmax(-1)[..., :-1].masked_fill(empty, 0.0) @ v


def results_of(run: Callable[..., Tensor], arguments: tuple[Any, ...], do: Tensor) -> dict[str, Tensor]:
    """The output and the gradients of q, k, v."""
    leaves = [x.detach().requires_grad_() for x in arguments[:3]]
    o = run((*leaves, *arguments[3:]))
    return {"o": o, **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, do), strict=True))}


def kernels(arguments: tuple[Any, ...], do: Tensor) -> dict[str, Tensor]:
    """The Triton kernels by themselves, whatever path the op would choose."""
    problem = problem_of(arguments)
    answer = triton_forward.launch(problem)
    found = triton_backward.launch(problem, answer, do, None)
    return {"o": answer.o, "dq": found.q, "dk": found.k, "dv": found.v}


def problem_of(arguments: tuple[Any, ...]) -> Problem:
    """The arguments as the kernels take them."""
    q, k, *_ = arguments
    offset, window, sinks, prefix = arguments[8:12]
    where = reach(
        offset=offset, window=window, sinks=sinks, prefix=prefix, rows=q.shape[2], columns=k.shape[2]
    )
    return Problem(*arguments[:8], where, *arguments[12:])


def check(shape: Shape, dtype: torch.dtype) -> Row:
    """The worst row of each result of op and kernels, in units of what is allowed."""
    arguments = arguments_of(shape, dtype)
    do = torch.randn(shape.batch, shape.heads, shape.sq, shape.dv, device="cuda").to(dtype)
    wide = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments)
    exact = results_of(partial(definition, shape), wide, do.double())
    eager = results_of(partial(definition, shape), arguments, do)
    found = {"op": results_of(lambda a: attend(*a)[0], arguments, do), "triton": kernels(arguments, do)}
    row: Row = {"shape": str(shape), "dtype": str(dtype).removeprefix("torch.")}
    for path, name in product(found, exact):
        row[f"{path} {name}"] = excess(found[path][name], exact[name], eager[name], BITS[dtype], name)
    row["passed"] = all(x <= 1 for x in row.values() if isinstance(x, float))
    return row


def check_all(shapes: tuple[Shape, ...]) -> Iterator[Row]:
    """Every shape in bf16, each second one in fp16, each fourth in fp32: compiling is what takes the time."""
    for n, shape in enumerate(shapes):
        for dtype, every in ((torch.bfloat16, 1), (torch.float16, 2), (torch.float32, 4)):
            if n % every == 0:
                yield check(shape, dtype)


def excess(got: Tensor, exact: Tensor, eager: Tensor, bits: int, name: str) -> float:
    """The largest error of a row over its allowance; a gradient's row may cancel, so it counts as a typical one."""
    if not torch.isfinite(got).all():
        return float("inf")
    error, own = ((x.double() - exact).norm(dim=-1) for x in (got, eager))
    size = exact.norm(dim=-1)
    size = size if name == "o" else size.clamp_min(float(size.square().mean().sqrt()))
    return float((error / ((2 if name == "o" else 3) * torch.maximum(own, 2.0**-bits * size) + 1e-30)).max())
