"""The original and the rewritten program side by side, on the example inputs."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.fx import GraphModule, Interpreter
from torch.utils import _pytree as pytree

Verdict = Literal["ok", "approximate", "differs"]

#: Bits that one rounding leaves, per dtype; a few less than the mantissa where long sums are the rule.
_BITS = {torch.bfloat16: 8, torch.float16: 11, torch.float32: 20, torch.float64: 48}
_FACTOR = 2.0

#: What a graph may raise when it is run in another precision than the one it was captured in.
_NO_REFERENCE = (RuntimeError, TypeError, ValueError, NotImplementedError, AssertionError)


@dataclass(frozen=True, slots=True)
class OutputCheck:
    """One output. max_error: largest absolute difference; relative_error: ||new - old|| / ||old||, both over all of it.

    allowance: the worst row's error in units of what it may be, at most 1 to pass; None where there is no such rule
    (no fp64 reference, or an approximation).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    max_error: float
    relative_error: float
    allowance: float | None
    verdict: Verdict


def compare(
    original: ExportedProgram,
    rewritten: ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    exact: bool,
) -> tuple[OutputCheck, ...]:
    """Runs both on copies of the inputs and judges each output.

    exact: hold each row to ||new - ref|| <= 2 max(||old - ref||, 2^-p ||ref||, w ||ref||), where ref is the original
    run in fp64 and w the worst relative row error of the original: a deep model amplifies the roundings of each row
    by chance, so a row may come out as badly as some other row did before, but not worse (on SmolLM2, 21 of 512 rows
    of a correct rewriting would break the rule without w). Each site by itself has been checked more strictly.
    Otherwise (an approximation was asked for) differences are only measured.
    """
    with torch.no_grad():
        old, new = (_outputs(program, args, kwargs) for program in (original, rewritten))
        reference = _reference(original, args, kwargs) if exact else None
    references = reference if reference and len(reference) == len(old) else [None] * len(old)
    return tuple(
        _check(name, value, other, ref, exact=exact)
        for (name, value), (_, other), ref in zip(old, new, references, strict=True)
        if isinstance(value, Tensor)
    )


def failed(checks: Sequence[OutputCheck]) -> list[OutputCheck]:
    """The outputs that differ more than rounding explains."""
    return [check for check in checks if check.verdict == "differs"]


def table(checks: Sequence[OutputCheck]) -> str:
    """The checks as plain text, a line for each output."""
    rows = [("output", "shape", "dtype", "max error", "relative", "row rule", "verdict"), *map(_row, checks)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _row(check: OutputCheck) -> tuple[str, ...]:
    shape = "x".join(map(str, check.shape)) or "scalar"
    rule = "-" if check.allowance is None else f"{check.allowance:.2f}"
    return (
        check.name,
        shape,
        check.dtype,
        f"{check.max_error:.1e}",
        f"{check.relative_error:.1e}",
        rule,
        check.verdict,
    )


def _outputs(
    program: ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    """The outputs by name; the inputs are copied, as a program may change them."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (tuple(args), dict(kwargs)))
    leaves, _ = pytree.tree_flatten_with_path(program.module()(*args, **kwargs))
    return [(pytree.keystr(path) or "output", value) for path, value in leaves]


class _InDouble(Interpreter):
    """Runs a graph in fp64: inputs, weights and every dtype that the graph names."""

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        return _doubled(super().placeholder(target, args, kwargs))

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return _InDouble(value).run if isinstance(value, GraphModule) else _doubled(value)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(
            target, *pytree.tree_map_only(torch.dtype, _double_dtype, (args, kwargs))
        )


def _doubled(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _double_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _reference(
    program: ExportedProgram, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor] | None:
    """The outputs in fp64, or None where the graph cannot be run so."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (tuple(args), dict(kwargs)))
    flat = program._graph_module_flat_inputs(args, kwargs)
    try:
        values = _InDouble(program.graph_module).run(*flat)
    except _NO_REFERENCE:
        return None
    specs = program.graph_signature.output_specs
    return [value for value, spec in zip(values, specs, strict=True) if spec.kind == OutputKind.USER_OUTPUT]


def _check(name: str, old: Tensor, new: Any, reference: Tensor | None, *, exact: bool) -> OutputCheck:
    dtype, shape = str(old.dtype).removeprefix("torch."), tuple(old.shape)
    if not isinstance(new, Tensor) or new.shape != old.shape or new.dtype != old.dtype:
        return OutputCheck(name, shape, dtype, math.inf, math.inf, None, "differs")
    error = _finite(new.double() - old.double())
    scale = float(_finite(old.double()).norm())
    relative = float(error.norm()) / scale if scale else float(error.norm())
    allowance = _allowance(old, new, reference) if exact else None
    largest = float(error.abs().max()) if error.numel() else 0.0
    verdict: Verdict = (
        "approximate" if not exact else "ok" if _agrees(old, new, relative, allowance) else "differs"
    )
    return OutputCheck(name, shape, dtype, largest, relative, allowance, verdict)


def _agrees(old: Tensor, new: Tensor, relative: float, allowance: float | None) -> bool:
    """By the row rule; without a reference, to half the digits of the dtype; whole numbers exactly."""
    if not old.is_floating_point():
        return torch.equal(old, new)
    if any(not torch.equal(test(old), test(new)) for test in (torch.isnan, torch.isposinf, torch.isneginf)):
        return False
    return relative <= 2.0 ** -(_BITS[old.dtype] / 2) if allowance is None else allowance <= 1


def _allowance(old: Tensor, new: Tensor, reference: Tensor | None) -> float | None:
    """The worst row's error as a share of what `compare` allows."""
    if reference is None or reference.shape != old.shape or not old.is_floating_point() or not old.numel():
        return None
    ref = reference.double()
    norms, lost, other = _rows(ref), _rows(old.double() - ref), _rows(new.double() - ref)
    worst = float((lost / norms.clamp_min(_tiny(norms.mean()))).max())
    allowed = _FACTOR * torch.maximum(lost, max(worst, 2.0 ** -_BITS[old.dtype]) * norms)
    return float((other / _tiny(allowed)).max())


def _tiny(x: Tensor) -> Tensor:
    """Without zeros, to divide by."""
    return x.clamp_min(torch.finfo(torch.float64).tiny)


def _rows(x: Tensor) -> Tensor:
    return _finite(x).norm(dim=-1) if x.dim() else _finite(x).abs()


def _finite(x: Tensor) -> Tensor:
    """Differences of equal infinities and of NaN are compared by pattern elsewhere."""
    return torch.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)


def as_dicts(checks: Sequence[OutputCheck]) -> Iterator[dict[str, object]]:
    """The checks for JSON, which knows no infinity."""
    for check in checks:
        body = {name: getattr(check, name) for name in OutputCheck.__slots__}
        yield {
            name: None if value in (math.inf, -math.inf) or value != value else value
            for name, value in body.items()
        }
