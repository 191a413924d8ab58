"""What is known of a loop that was read, and when two loops are the same, so that one reading serves both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from attnopt.passes.linear_loop_alike import Shapes
from attnopt.passes.linear_loop_decay import Found
from attnopt.passes.linear_loop_numbers import Factor
from attnopt.passes.linear_loop_roles import Cast, Labels
from attnopt.passes.linear_loop_tables import Table
from attnopt.passes.reroll_cut import Region


@dataclass(frozen=True, slots=True)
class Reading:
    """One region, read completely. shapes: of the tensors of which trials need fewer elements; factors: symbolic."""

    region: Region
    tables: tuple[Table, ...]
    cast: Cast
    labels: Labels
    decay: Found | None
    scale: float
    state_dims: tuple[object, ...] | None
    shapes: Shapes
    factors: tuple[Factor, ...] = ()


def normal_form(region: Region, tables: Sequence[Table]) -> tuple[str, tuple[Node, ...]]:
    """The region as text, equal for equal ones, and its nodes in the order in which the text numbers them.

    What enters is numbered as it is used: one layer may share with another what was computed before its own.
    """
    given = {*region.leaves, *(t.base for t in tables), *region.numbers}
    used = (source for node in region.nodes for source in node.all_input_nodes if source in given)
    entering = dict.fromkeys((*used, *region.leaves, *(t.base for t in tables), *region.numbers))
    inside = [n for n in region.nodes if n not in entering]
    order = tuple(dict.fromkeys((*entering, *inside, *([region.state] if region.state is not None else []))))
    number = {node: n for n, node in enumerate(order)}
    lines = [f"{number[n]}: {_shown(n, number)}" for n in inside]
    held = [f"{number[n]}: {_meta(n)}" for n in entering]
    formulas = [(number[t.node], number[t.base], t.slopes, t.start, t.sign, t.cut) for t in tables]
    ends = (
        number[region.root],
        None if region.state is None else number[region.state],
        region.dim,
        bool(region.leaks),
    )
    return "\n".join([str(ends), str(formulas), *held, *lines]), order


def _shown(node: Node, number: Mapping[Node, int]) -> str:
    """A tensor that the graph holds is known by its name alone."""
    given = pytree.tree_map(
        lambda x: f"%{number[x]}" if isinstance(x, Node) else x, (node.args, dict(node.kwargs))
    )
    return f"{node.target} {given} {_meta(node)}"


def _meta(node: Node) -> str:
    value: Any = node.meta.get("val")
    if not isinstance(value, Tensor):
        return str(value)
    return f"{value.dtype} {tuple(value.shape)} {value.device}"


def moved(found: Reading, region: Region, tables: tuple[Table, ...], to: Mapping[Node, Node]) -> Reading:
    """The reading of one region as that of an equal one; to: its nodes -> those of the other."""
    cast = found.cast
    own = replace(
        cast, q=to[cast.q], k=to[cast.k], v=to[cast.v], state=None if cast.state is None else to[cast.state],
        gates=tuple(to[n] for n in cast.gates), others=tuple(to[n] for n in cast.others),
        patterns={to[n]: p for n, p in cast.patterns.items()},
    )  # fmt: skip
    labels = replace(found.labels, by={to[n]: dims for n, dims in found.labels.by.items()})
    decay = found.decay
    if decay is not None and decay.node is not None:
        decay = replace(decay, node=to[decay.node])
    shapes = {to[n]: shape for n, shape in found.shapes.items()}
    factors = tuple(replace(factor, node=to[factor.node]) for factor in found.factors)
    return replace(
        found,
        region=region,
        tables=tables,
        cast=own,
        labels=labels,
        decay=decay,
        shapes=shapes,
        factors=factors,
    )
