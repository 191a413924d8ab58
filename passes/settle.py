"""Symbolic floats that a site was read with as numbers: before it is rewritten, Dynamo's guards fix them.

With `dynamic=True` Dynamo hands the floats that a module holds to the graph as symbols. A scale that stays one is an
operand of the call. A soft cap, the value of a fill, or the factor of a sum is a number in the spec: it is read as it
is while compiling, and evaluating the symbol makes Dynamo guard on it, so that another value compiles anew.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

import sympy
import torch
from torch.fx import Node

from attnopt.passes import emit
from attnopt.passes.replay import Replay
from attnopt.passes.sizes import is_float_input
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow


def settle(shadow: Shadow, *sites: Site) -> None:
    """Guards on each symbolic float that one of the sites (words for the same) was read with as a number.

    Raises Reject where guards come too late to be heeded.
    """
    is_static = all(_float_of(node) is None for node in shadow.module.graph.nodes)
    for site in () if is_static else sites:
        for value in floats_read(shadow, site):
            if value.node.shape_env.frozen:
                raise Reject(
                    "a number that may change was read as it is now, and no guard can be added", site.root
                )
            float(value)


def floats_read(shadow: Shadow, site: Site) -> Iterator[torch.SymFloat]:
    """The floats from outside that the graph computes the site with, but for those that are operands and no more.

    A float that is an operand and enters the site at several places may have been read as a number at one of them.
    """
    replay = Replay.of(shadow, site)
    operands = set(emit.leaves(site))
    inside = {*replay.nodes, *replay.leaves, *_looked_into(site)}
    floats = {node: value for node in inside if (value := _float_of(node)) is not None}
    uses = Counter(symbol for node in inside for symbol in _symbols(floats, node.all_input_nodes))
    for node, value in floats.items():
        if node not in operands or any(uses[symbol] > 1 for symbol in value.node.expr.free_symbols):
            yield value


def _looked_into(site: Site) -> set[Node]:
    """What masks and biases are made of: the spec may say more of a tensor than that it is one."""
    given = {part.node for name, part in emit.parts(site) if name not in ("q", "k", "v", "factor")}
    found: set[Node] = set()
    pending = [above for node in given for above in node.all_input_nodes]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _float_of(node: Node) -> torch.SymFloat | None:
    value = node.meta.get("val")
    return value if isinstance(value, torch.SymFloat) and is_float_input(value) else None


def _symbols(floats: dict[Node, torch.SymFloat], nodes: Iterable[Node]) -> set[sympy.Symbol]:
    return {symbol for node in nodes if node in floats for symbol in floats[node].node.expr.free_symbols}
