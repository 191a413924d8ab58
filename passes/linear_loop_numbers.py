"""Numbers made of symbolic sizes that a loop over positions computes with, such as the scale D ** -0.5 of each token.

A trial at the sizes seen would take such a number for the number that it was. So it is drawn as freely as the tensors
are: the loop is analytic in it as well, and what agrees at random values of it agrees at each. It may be a common
factor of the output, of the last state, or of both, to any whole power; then it is multiplied onto the queries or the
keys of the site as the expression that it is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, log2, prod

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.reroll_cut import Region
from attnopt.passes.reroll_sizes import TAKES, name_of
from attnopt.passes.site import Operand
from attnopt.rule import Reject

#: Operations that take sizes to lay tensors out, not to compute with.
_LAYS_OUT = TAKES | {
    "zeros", "ones", "empty", "eye", "arange", "new_zeros", "new_ones", "new_empty", "view", "reshape", "_unsafe_view",
    "unflatten", "expand", "broadcast_to", "repeat", "pad", "constant_pad_nd", "sym_size", "slice_scatter",
    "select_scatter", "as_strided", "tril", "triu", "unfold", "roll", "zeros_like", "ones_like", "empty_like",
}  # fmt: skip
#: Operations that multiply or divide a tensor by a number.
_SCALES = frozenset({"mul", "multiply", "div", "divide", "true_divide"})
#: A number to a higher power is no scale.
_MOST_POWER = 4


@dataclass(frozen=True, slots=True)
class Factor:
    """A number of the graph and its powers: those that multiply the queries, and the keys."""

    node: Node
    queries: int
    keys: int


def factors(region: Region) -> tuple[Node, ...]:
    """The symbolic numbers that multiply or divide tensors. Raises Reject where one is used in another way, too."""
    scaling = {source: node for node in region.nodes for source in _symbolic(node) if _computes(node)}
    for node in region.nodes:
        for source in _symbolic(node):
            if source in scaling and (name_of(node) not in _SCALES or node.args[:1] == (source,)):
                raise _refused(source, scaling[source])
    return tuple(scaling)


def _symbolic(node: Node) -> list[Node]:
    return [x for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.SymInt | torch.SymFloat)]


def _computes(node: Node) -> bool:
    return name_of(node) not in _LAYS_OUT


def _refused(number: Node, node: Node) -> Reject:
    return Reject(
        f"a loop over positions computes with {number.name}, a number made of symbolic sizes, and not as a factor of "
        "all that it makes; multiply the queries by it before the loop",
        node,
        3,
    )


def powers(region: Region, node: Node, before: Mapping[Node, Tensor], after: Mapping[Node, Tensor]) -> Factor:
    """The powers of a factor. before, after: values of the region; in the second the factor is twice as large.

    Raises Reject where it is no common factor of the output, and of the last state where there is one.
    """
    ends = (region.root, *([region.state] if region.state is not None else []))
    found = [_power(before[end].detach(), after[end].detach()) for end in ends]
    if any(power is None for power in found):
        raise _refused(node, region.root)
    out, state = (*(power or 0 for power in found), 0)[:2]
    return Factor(node, out - state, state)


def _power(before: Tensor, after: Tensor) -> int | None:
    """p where one value is 2 ** p times the other in all elements."""
    if not bool((before != 0).any()):
        return 0 if torch.equal(before, after) else None
    ratio = float(after.norm() / before.norm())
    if not isfinite(ratio) or ratio == 0:
        return None
    power = round(log2(ratio))
    alike = bool(((after - before * 2.0**power).abs() <= 1e-9 * after.abs().max()).all())
    return power if alike and abs(power) <= _MOST_POWER else None


def common(found: Iterable[Factor], values: Mapping[Node, float]) -> float:
    """What the factors are in the weight of a position for itself."""
    return float(prod(values[f.node] ** (f.queries + f.keys) for f in found))


def times(node: Node, power: int) -> tuple[Operand, ...]:
    """A number to a power, as what an operand is multiplied with."""
    return (Operand(node, (), inverse=power < 0),) * abs(power)
