"""What the elements of a given tensor have in common: one number, evenly spaced ones, or one number a diagonal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from attnopt.passes.mask_formula import Cases, Index, Logic, NotUnderstood, always
from attnopt.passes.mask_numbers import from_float

#: A band between two diagonals has three runs; what has many more is data.
MOST_RUNS = 4
#: Whole numbers up to here are the same in double precision.
EXACT = 2**53


@dataclass(frozen=True, slots=True)
class Spaced:
    """start + step * n, for element n along the only dimension that is longer than 1; step 0 for one number."""

    start: float
    step: float = 0.0


@dataclass(frozen=True, slots=True)
class Diagonals:
    """Element (r, c) of the only two dimensions longer than 1 is that of the first run with c - r <= its end.

    rest: beyond all of them.
    """

    runs: tuple[tuple[int, float], ...]
    rest: float


@dataclass(frozen=True, slots=True)
class Planes:
    """In each plane of the last two dimensions, of any size, what `Diagonals` says; the same in all planes."""

    runs: tuple[tuple[int, float], ...]
    rest: float


@dataclass(frozen=True, slots=True)
class Negative:
    """Along the only dimension that is longer than 1 all numbers lie below 0, and none is infinite: log decays."""


Form = Spaced | Diagonals | Planes | Negative


def form_of(held: Tensor) -> Form | None:
    """The form of a tensor, whatever its size; None where it has none of these."""
    if held.numel() == 0 or held.dtype.is_complex:
        return None
    values = held.detach().reshape([n for n in held.shape if n != 1])
    first = values.flatten()[0]
    if bool((values == first).all()):
        return Spaced(float(first)) if _is_exact(values) else None
    if values.dim() == 1 and _is_exact(values):
        return _spaced(values) or _negative(values)
    return _diagonals(values) if values.dim() == 2 else None


def _negative(values: Tensor) -> Form | None:
    below = values.dtype.is_floating_point and bool(((values < 0) & values.isfinite()).all())
    return Negative() if below else None


def _is_exact(values: Tensor) -> bool:
    return values.dtype.is_floating_point or bool((values.long().abs() < EXACT).all())


def _spaced(values: Tensor) -> Form | None:
    numbers = values.double()
    start, step = float(numbers[0]), float(numbers[1] - numbers[0])
    whole = math.isfinite(start + step) and start.is_integer() and step.is_integer()
    places = torch.arange(len(numbers), dtype=torch.float64, device=numbers.device)
    return Spaced(start, step) if whole and bool((numbers == start + step * places).all()) else None


def _diagonals(values: Tensor) -> Form | None:
    """The numbers of the diagonals, from the lower left corner to the upper right one."""
    rows, columns = values.shape
    along = torch.cat([values[:, 0].flip(0), values[0, 1:]])
    ends = (along[1:] != along[:-1]).nonzero().flatten()[:MOST_RUNS].tolist()
    r, c = (torch.arange(n, device=values.device) for n in (rows, columns))
    if len(ends) == MOST_RUNS or not bool((values == along[c[None, :] - r[:, None] + rows - 1]).all()):
        return None
    return Diagonals(tuple((end - rows + 1, float(along[end])) for end in ends), float(along[-1]))


def element_of(form: Form, index: Index, shape: tuple[object, ...], logic: Logic) -> Cases:
    """The element of a tensor of this form."""
    kept = [at for at, size in zip(index, shape, strict=True) if size != 1]
    match form:
        case Spaced(start, step) if step == 0:
            return always(from_float(start))
        case Spaced(start, step) if len(kept) == 1:
            return always(sympy.Integer(int(start)) + sympy.Integer(int(step)) * kept[0])
        case Diagonals(runs, rest) if len(kept) == 2:
            return _on_diagonal(runs, rest, kept[1] - kept[0], logic)
        case Planes(runs, rest) if len(index) > 1:
            return _on_diagonal(runs, rest, index[-1] - index[-2], logic)
    raise NotUnderstood


def _on_diagonal(runs: tuple[tuple[int, float], ...], rest: float, at: sympy.Expr, logic: Logic) -> Cases:
    value = always(from_float(rest))
    for end, number in reversed(runs):
        value = logic.select(logic.at_most_zero(at - end), always(from_float(number)), value)
    return value


def plane(form: Planes, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of this form."""
    r, c = (torch.arange(n) for n in shape[-2:])
    value = torch.full((shape[-2], shape[-1]), form.rest, dtype=torch.float64)
    for end, number in reversed(form.runs):
        value = torch.where(c[None, :] - r[:, None] <= end, number, value)
    return value.to(dtype).expand(*shape).clone()
