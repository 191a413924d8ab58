"""Queries and keys as functions of their positions, run in fp64 on drawn values, with positions shifted at will."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import sympy
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from attnopt.passes import emit
from attnopt.passes.constants import uniform
from attnopt.passes.layout import Axis
from attnopt.passes.mask_writes import operation
from attnopt.passes.replay import evaluate
from attnopt.passes.rope_slice import Slice, is_float, is_tensor
from attnopt.passes.rope_tables import Rows, leaf_of
from attnopt.passes.site import Operand
from attnopt.passes.sizes import Concrete, Size, is_one, product, same
from attnopt.rule import Reject, Site

#: Queries and keys with more elements are not drawn at the graph's own sizes.
BUDGET = 2**22
#: So many queries tell everything.
FEW = 11

Side = Literal["q", "k"]
Family = Literal["normal", "signs"]


@dataclass(frozen=True)
class Trial:
    """One choice of sizes and of values for everything that is no position.

    slices: what makes q and k. values: of all leaves, positions as they stand in the graph. held: the elements of
    tables that are looked up.
    """

    site: Site
    slices: Mapping[Side, Slice]
    sizes: Concrete
    values: Mapping[Node, Any]
    held: Mapping[Node, Tensor]

    def run(self, side: Side, shifts: Mapping[Node, Tensor | int]) -> Tensor:
        """q (B, H, Sq, D) or k (B, Hkv, Sk, D) with some leaves, of whole numbers, shifted."""
        cut = self.slices[side]
        values = {n: self._shifted(cut, n, shifts[n]) if n in shifts else self.values[n] for n in cut.leaves}
        known = evaluate(cut.nodes, values, self.sizes)
        operand = bare(self.site.operands[side])
        return emit.arrange(operand, side, emit.result_of(self.site).roles, known, dict(self.lengths))

    @cached_property
    def lengths(self) -> Mapping[Axis, int]:
        """A number for every axis."""
        return {axis: self.sizes.of(axis.size) for axis in _axes(self.site)}

    def _shifted(self, cut: Slice, node: Node, by: Tensor | int) -> Any:
        rows = cut.rows.get(node)
        if rows is None:
            return self.values[node] + by
        start, table = (
            self.values[rows.start] if isinstance(rows.start, Node) else rows.start,
            self.values[rows.table],
        )
        return table.index_select(rows.dim, start + torch.arange(self.count(node)) + by)

    def count(self, source: Node) -> int:
        """How many positions a source holds."""
        value = self.values[source]
        rows = next((cut.rows[source] for cut in self.slices.values() if source in cut.rows), None)
        dim = counting_dim(value.shape, self.counts) if rows is None else rows.dim
        return int(value.shape[dim]) if value.dim() else 1

    def one(self, source: Node, place: int) -> Tensor:
        """What to shift a source by, so that one of its positions changes."""
        value, count = self.values[source], self.count(source)
        if any(source in cut.rows for cut in self.slices.values()):
            return (torch.arange(count) == place).long()
        at = _along(value.shape, counting_dim(value.shape, self.counts)) == place
        return at.to(value.dtype)

    @property
    def counts(self) -> tuple[int, int]:
        """How many queries and keys there are."""
        return counts_of(self.site, self.sizes)

    @property
    def looked_up(self) -> bool:
        """Whether tables decide."""
        return bool(self.held)


def bare(operand: object) -> Operand:
    """The tensor of an operand as the graph has it, without what is multiplied onto it later."""
    if not isinstance(operand, Operand):
        raise Reject("queries and keys that no tensor of the graph holds")
    plain = replace(operand, factor=1.0, times=(), rsqrt=(), dtype=None)
    return replace(plain, beside=tuple(bare(part) for part in operand.beside))


def trial(
    site: Site, slices: Mapping[Side, Slice], held: Mapping[Node, Tensor], family: Family, seed: int
) -> Trial:
    """Values drawn at the graph's sizes, or at smaller ones. Reject where no sizes can be run."""
    for sizes in _sizes(site, slices):
        try:
            values = _values(slices, held, Drawing(sizes, counts_of(site, sizes), family, seed))
            drawn = Trial(site, slices, sizes, values, held)
            shapes = {side: drawn.run(side, {}).shape for side in slices}
        except (RuntimeError, ValueError, TypeError, IndexError, Reject):
            continue
        if all(tuple(shape) == drawn_shape(drawn, side) for side, shape in shapes.items()):
            return drawn
    raise Reject("its queries and keys could not be tried out in fp64 at any size", site.root)


def text(site: Site, slices: Mapping[Side, Slice], nodes: Sequence[Node], held: Mapping[Node, Tensor]) -> str:
    """What the slices compute, as text: the same for equal layers, whatever their place in the graph."""
    number = {node: n for n, node in enumerate(nodes)}
    axis = {a: n for n, a in enumerate(_axes(site))}
    sides = []
    for side, cut in slices.items():
        parts = bare(site.operands[side]).parts
        dims = [[[axis.get(a, -1) for a in axes] for axes in part.dims] for part in parts]
        sides.append(f"{side} {[number[n] for n in cut.roots]} {dims} {[number[n] for n in cut.leaves]}")
    sizes = [(n, str(a.size)) for a, n in axis.items()]
    sides += [f"{number.get(node, node.name)} holds {id(value)}" for node, value in held.items()]
    leaves = {node for cut in slices.values() for node in cut.leaves}
    return "\n".join([str(sizes), *sides, *(_line(node, number, node in leaves) for node in nodes)])


def _line(node: Node, number: Mapping[Node, int], is_leaf: bool) -> str:  # noqa: FBT001 - one caller
    """What a node does; of a leaf only what counts: its kind, and numbers that it holds for certain."""
    value = node.meta.get("val")
    made = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)
    if is_leaf and operation(node) != "arange":
        return f"leaf {made} {uniform(node) if isinstance(value, Tensor) else ''}"
    given = map_arg((node.args, dict(node.kwargs)), lambda n: f"%{number.get(n, n.meta.get('val'))}")
    return f"{node.target} {given} {made}"


def drawn_shape(drawn: Trial, side: Side) -> tuple[int, ...]:
    """The shape that the canonical operand has to have."""
    layout = emit.result_of(drawn.site).roles.layout(side)
    shape = [int(product(drawn.lengths[a] for a in axes)) for axes in layout]
    operand = drawn.site.operands[side]
    beside = operand.beside if isinstance(operand, Operand) else ()
    if beside:
        shape[-1] = drawn.run(side, {}).shape[-1]
    return tuple(shape)


def _axes(site: Site) -> Iterator[Axis]:
    r = emit.result_of(site).roles
    for axes in (r.batch, r.heads, r.query, r.key, r.d, r.dv, r.more):
        yield from axes


def _sizes(site: Site, slices: Mapping[Side, Slice]) -> Iterator[Concrete]:
    """Few queries first where the graph is large, then as many as it has, then the sizes that were seen."""
    roles = emit.result_of(site).roles
    symbols = {s: FEW for a in roles.query for s in sympy.sympify(a.size).free_symbols}
    symbols |= {s: 2 for a in roles.batch for s in sympy.sympify(a.size).free_symbols if s not in symbols}
    long = {a.size: FEW for a in (*roles.query, *roles.key) if isinstance(a.size, int) and a.size > FEW}
    everything = (*roles.batch, *roles.heads, *roles.query, *roles.d)
    if long:
        yield Concrete(long, dict(symbols))
    for chosen in (symbols, _seen(slices)):
        whole = Concrete(symbols=dict(chosen))
        if product(whole.of(a.size) for a in everything) <= BUDGET:
            yield whole


def _seen(slices: Mapping[Side, Slice]) -> dict[sympy.Symbol, int]:
    """Each size that is a symbol, as it was while tracing: also of those that guards alone hold to be equal."""
    for node in (n for cut in slices.values() for n in (*cut.nodes, *cut.leaves)):
        for size in getattr(node.meta.get("val"), "shape", ()):
            if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
                environment = size.node.shape_env
                held = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
                return {symbol: int(value) for symbol, value in held.items() if symbol.is_integer}
    return {}


@dataclass(frozen=True, slots=True)
class Drawing:
    """How values are drawn; counts: how many queries and keys there are."""

    sizes: Concrete
    counts: tuple[int, int]
    family: Family
    seed: int


def counts_of(site: Site, sizes: Concrete) -> tuple[int, int]:
    """How many queries and keys a site has."""
    roles = emit.result_of(site).roles
    queries, keys = (int(product(sizes.of(a.size) for a in axes)) for axes in (roles.query, roles.key))
    return queries, keys


def _values(slices: Mapping[Side, Slice], held: Mapping[Node, Tensor], how: Drawing) -> dict[Node, Any]:
    free = torch.Generator().manual_seed(how.seed)
    found: dict[Node, Any] = {node: wide(value) for node, value in held.items()}
    tables = {n for cut in slices.values() for n in cut.tables}
    for node in dict.fromkeys(n for cut in slices.values() for n in cut.leaves if n not in cut.rows):
        kind: Family | Literal["rates"] = "rates" if node in tables else how.family
        if node not in found:
            found[node] = _value(node, how, kind, free)
    for node, rows in ((n, r) for cut in slices.values() for n, r in cut.rows.items()):
        found |= _sliced(node, rows, found, how.sizes)
    return found


def _sliced(node: Node, rows: Rows, known: Mapping[Node, Any], sizes: Concrete) -> dict[Node, Any]:
    """A slice of a table, the table, and where the slice starts."""
    chain, leaf = [rows.table], leaf_of(rows.table)
    while chain[0] is not leaf:
        chain.insert(0, chain[0].all_input_nodes[0])
    numbers = {n: sizes.number(n.meta["val"]) for n in node.all_input_nodes if not is_tensor(n)}
    table = evaluate(chain[1:], {leaf: known[leaf]}, Concrete())[rows.table]
    return {
        **numbers,
        rows.table: table,
        node: evaluate((node,), {**numbers, rows.table: table}, sizes)[node],
    }


def wide(value: Tensor) -> Tensor:
    """Real and complex numbers in double precision, on the CPU."""
    value = value.detach().cpu()
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def _value(node: Node, how: Drawing, kind: str, free: torch.Generator) -> Any:
    value, sizes = node.meta.get("val"), how.sizes
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return sizes.number(value)
    if not isinstance(value, Tensor):
        return value
    if operation(node) == "arange":
        return _arange(node, sizes)
    shape = [sizes.of(s) for s in value.shape]
    if (number := uniform(node)) is not None:
        return torch.full(shape, number, dtype=torch.float64 if is_float(node) else value.dtype)
    if not is_float(node):
        return _along(shape, counting_dim(shape, how.counts))
    if kind == "rates":
        return 0.3 + 1.4 * torch.rand(shape, generator=free, dtype=torch.float64)
    if kind == "signs":
        return torch.randint(0, 2, shape, generator=free).double() * 2 - 1
    return torch.randn(shape, generator=free, dtype=torch.float64)


def _arange(node: Node, sizes: Concrete) -> Any:
    numbers = {n: sizes.number(n.meta["val"]) for n in node.all_input_nodes if not is_tensor(n)}
    return evaluate((node,), numbers, sizes)[node]


def _along(shape: Sequence[int], dim: int) -> Tensor:
    """Whole numbers that count up along one dimension."""
    if not shape:
        return torch.zeros((), dtype=torch.int64)
    count = torch.arange(shape[dim])
    return count.view([-1 if n == dim else 1 for n in range(len(shape))]).expand(list(shape)).clone()


def counting_dim(shape: Sequence[Size], counts: Sequence[Size]) -> int:
    """The dimension along which a tensor of positions counts: the last that has one for each query, or each key.

    Where none has, the last with several.
    """
    fits = [n for n, size in enumerate(shape) if any(same(size, count) for count in counts)]
    several = [n for n, size in enumerate(shape) if not is_one(size)]
    return (fits or several or [max(len(shape) - 1, 0)])[-1]


def shifted(sources: Iterable[Node], by: int) -> dict[Node, Tensor | int]:
    """All of them by one number."""
    return dict.fromkeys(sources, by)
