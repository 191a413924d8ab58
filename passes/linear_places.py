"""Positions of a site by its axes: where batches or heads are made of several axes, each of them is a position too."""

from collections.abc import Iterator
from dataclasses import dataclass

import sympy

from attnopt.passes.layout import Axes, Dims, Space
from attnopt.passes.mask_bounds import POSITIONS, Bounds
from attnopt.passes.mask_formula import Index, NotUnderstood
from attnopt.passes.site import Roles
from attnopt.passes.sizes import product


@dataclass(frozen=True, slots=True)
class Places:
    """Names "b", "h", "i", "j" for whole groups of axes, and "b0", "b1", ... for the axes of a group of several."""

    roles: Roles

    @property
    def axes(self) -> dict[str, Axes]:
        """Each name with its axes."""
        return dict(self._named())

    def _named(self) -> Iterator[tuple[str, Axes]]:
        r = self.roles
        for name, group in (("b", r.batch), ("h", r.heads)):
            yield name, group
            if len(group) > 1:
                yield from ((f"{name}{n}", (axis,)) for n, axis in enumerate(group))
        yield from (("i", r.query), ("j", r.key))

    def index(self, space: Space, dims: Dims) -> Index:
        """The element of a tensor with these dimensions. Raises NotUnderstood where a dimension is no position."""
        names = {axes: name for name, axes in reversed(list(self._named())) if axes}
        return tuple(_symbol_of(names, axes) for axes in space.resolve(dims))

    def bounds(self, known: Bounds) -> Bounds:
        """The same bounds with all positions."""
        for name, axes in self._named():
            known = known.with_position(_symbol(name), product(a.size for a in axes))
        return known


def _symbol_of(names: dict[Axes, str], axes: Axes) -> sympy.Expr:
    if axes and axes not in names:
        raise NotUnderstood
    return _symbol(names[axes]) if axes else sympy.Integer(0)


def _symbol(name: str) -> sympy.Symbol:
    return next(
        (s for s in POSITIONS.values() if s.name == name), sympy.Symbol(name, integer=True, nonnegative=True)
    )
