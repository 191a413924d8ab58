"""Compiles a function with attnopt and with nothing, runs both forwards and backwards, and compares them row by row."""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from oracle import BITS, assert_same
from torch import Tensor

import attnopt
from attnopt.report import Report, merge

Function = Callable[..., Any]


@dataclass(frozen=True)
class Run:
    """outputs: the floating-point tensors that came back. gradients: of the first inputs, None for one without."""

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]


def compiled(function: Function, *, dynamic: bool | None = False, **options: object) -> Function:
    """`function` under torch.compile with attnopt; the inner compiler is "eager" unless told otherwise."""
    torch._dynamo.reset()
    return torch.compile(function, backend="attnopt", options={"inner": "eager", **options}, dynamic=dynamic)


def run(
    function: Function, inputs: Sequence[Any], differentiable: int = 0, fixed: Container[int] | None = None
) -> Run:
    """One call on copies of the inputs, and one backward pass through all outputs.

    fixed: the only sizes that the compiled code may depend on; None: it may depend on all.
    """
    held = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
    if fixed is not None:
        _free_sizes(held, fixed)
    roots = [x.requires_grad_() for x in held[:differentiable]]
    out = function(*held)
    outputs = tuple(x for x in (out if isinstance(out, tuple) else (out,)) if x.is_floating_point())
    if roots:
        weights = [
            torch.arange(1.0, x.numel() + 1).view(x.shape).to(x.dtype).div(x.numel()).cos() for x in outputs
        ]
        torch.autograd.backward(outputs, weights)
    return Run(tuple(x.detach() for x in outputs), tuple(root.grad for root in roots))


def _free_sizes(inputs: Sequence[Tensor], fixed: Container[int]) -> None:
    """Dynamo raises an error if the code then depends on one of the other sizes."""
    for x in inputs:
        for dim, size in enumerate(x.shape):
            if size > 1 and size not in fixed:
                torch._dynamo.mark_dynamic(x, dim)


def widened(inputs: Sequence[Any]) -> list[Any]:
    """The inputs in fp64."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def assert_runs_agree(got: Run, exact: Run, eager: Run) -> None:
    """Outputs by the row rule; layouts as eager makes them."""
    for n, (out, want, plain) in enumerate(zip(got.outputs, exact.outputs, eager.outputs, strict=True)):
        assert (out.dtype, out.stride()) == (plain.dtype, plain.stride())
        assert_same(out, want, plain, what=f"output {n}")
    largest = max((_largest_row(x) for x in exact.gradients if x is not None), default=0.0)
    for n, (gradient, want, plain) in enumerate(
        zip(got.gradients, exact.gradients, eager.gradients, strict=True)
    ):
        assert (gradient is None) == (plain is None)
        if gradient is not None and want is not None:
            assert_gradients_agree(gradient, want, plain, what=f"gradient {n}", largest=largest)


def _largest_row(x: Tensor) -> float:
    return float(x.detach().double().nan_to_num(0.0, 0.0, 0.0).norm(dim=-1).max()) if x.numel() else 0.0


def assert_gradients_agree(
    got: Tensor, exact: Tensor, eager: Tensor, *, what: str, largest: float = 0.0
) -> None:
    """Each row within 3 times eager's error, or 3 roundings of the largest row.

    A row of a gradient of softmax attention is a difference, weights * (d_weights - delta), that may cancel down to
    nothing; its rounding has the size of what cancels. One that is nothing in all its rows, as that of a number added
    to all keys of a row, has no row of that size: there it is the `largest` of the other gradients. Where eager's is
    NaN (it divides rows without keys by 0, and the gradient of the whole head with them) the kernels' may be a number.
    """
    known, bits = eager.isfinite(), BITS[got.dtype]
    got, exact, eager = (x.detach().double().where(known, 0.0) for x in (got, exact, eager))
    error, allowed = (got - exact).norm(dim=-1), (eager - exact).norm(dim=-1)
    mine = exact.norm(dim=-1).max()
    rounding = 2.0**-bits * (mine if mine > 2.0**-40 * largest else largest)
    assert bool((error <= 3 * allowed.clamp_min(rounding)).all()), (
        f"{what} is off by {float(error.max()):.2e}"
    )


def reports_after(earlier: Sequence[Report]) -> Report:
    """The reports of the compilations since `earlier`, as one; the history is bounded, so they are told by identity."""
    seen = {id(report) for report in earlier}
    return merge([report for report in attnopt.reports() if id(report) not in seen])


def check_like_eager(
    function: Function,
    inputs: Sequence[Any],
    *,
    differentiable: int = 0,
    dynamic: bool | None = False,
    fixed: Container[int] | None = None,
    **options: object,
) -> Report:
    """Compiles, compares with eager on `inputs`, and returns the report of this compilation. `fixed` as in `run`."""
    before = attnopt.reports()
    got = run(compiled(function, dynamic=dynamic, **options), inputs, differentiable, fixed)
    eager = run(function, inputs, differentiable)
    assert_runs_agree(got, run(function, widened(inputs), differentiable), eager)
    report = reports_after(before)
    assert report.warnings == ()
    return report
