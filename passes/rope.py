"""How positions enter the scores of a softmax site: by rotations that depend on differences alone, or not at all.

Rotary embedding (Su et al., arXiv 2104.09864) in any spelling: halves or neighbours, partial, from cos and sin that are
computed or looked up, by real or complex products. What is read is not the spelling but the law, in fp64 on drawn
values: shifting the positions of queries and keys by the same number changes no score. Queries and keys are smooth
functions of their positions (`rope_slice` knows no other operations), so what holds for drawn ones holds for all.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes import emit
from attnopt.passes.constants import uniform
from attnopt.passes.rope_elsewhere import check_tables, check_values
from attnopt.passes.rope_law import (
    check_law,
    check_lengths,
    check_precision,
    positions,
    tolerance,
    turns_apart,
)
from attnopt.passes.rope_slice import Slice, is_count, is_float, slice_above
from attnopt.passes.rope_tables import leaf_of, values_of
from attnopt.passes.rope_trial import Side, Trial, bare, shifted, text, trial
from attnopt.passes.site import Operand
from attnopt.passes.sizes import product
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow

Style = Literal["halves", "neighbours", "other"]


@dataclass(frozen=True, slots=True)
class Rotation:
    """Queries and keys turn with their positions, pair by pair of features, and scores depend on differences only.

    style: which features turn together, c and c + width / 2, or 2c and 2c + 1, from feature `start` on; "other" pairs
    turn as well. frequencies: the tensor that holds them, or radians a position (in (-pi, pi]) where the graph computes
    them. scaling: what multiplies the turned features (None: it differs). positions: the nodes that count, of the
    queries; counted: the graph itself makes them count up by one, nobody hands them in. apart: each sequence may have
    positions of its own.
    """

    style: Style
    width: int
    start: int
    frequencies: Node | tuple[float, ...]
    scaling: float | None
    positions: tuple[Node, ...]
    counted: bool
    apart: bool = False

    def at(self, nodes: Mapping[Node, Node]) -> "Rotation":
        """The same rotation by other nodes that do the same."""
        rates = self.frequencies
        return replace(
            self,
            frequencies=nodes[rates] if isinstance(rates, Node) else rates,
            positions=tuple(nodes[node] for node in self.positions),
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found of a pair of slices, whose nodes these are: the rotation, or why there is none."""

    nodes: tuple[Node, ...]
    found: Rotation | Reject


#: What makes queries and keys.
Slices = Mapping[Side, Slice]

#: Verdicts by the text of what was tried: equal layers are tried once.
Known = dict[str, Verdict]


def read_rotation(
    shadow: Shadow,
    site: Site,
    before: frozenset[Node] = frozenset(),
    known: Known | None = None,
    slices: Slices | None = None,
) -> Rotation | None:
    """The rotation of a site's queries and keys; None where no position enters it.

    before: nodes in other attentions, whose results know no positions but by those. known: is asked, and added to.
    slices: those of the site, if they are at hand.
    Reject where positions enter otherwise than by a rotation.
    """
    slices = slices_of(shadow, site) if slices is None else slices
    for cut in slices.values():
        check_tables(shadow, cut)
    data = [n for cut in slices.values() for n in cut.leaves if n not in cut.sources]
    length = product(a.size for a in emit.result_of(site).roles.query)
    check_values(shadow, (*data, *_beside(site)), before, length)
    if not any(root in cut.moving for cut in slices.values() for root in cut.roots):
        return None
    nodes = tuple(dict.fromkeys(n for cut in slices.values() for n in (*cut.leaves, *cut.nodes)))
    held = tables_of(shadow, slices)
    key, known = text(site, slices, nodes, held), {} if known is None else known
    if key not in known:
        known[key] = _verdict(site, slices, nodes, held)
    return _recalled(known[key], nodes)


def tables_of(shadow: Shadow, slices: Mapping[Side, Slice]) -> dict[Node, Tensor]:
    """The tables of which positions choose rows, with their elements. Reject where those are not known."""
    taken = [
        n for cut in slices.values() for n in (*cut.looked_up, *(leaf_of(r.table) for r in cut.rows.values()))
    ]
    found: dict[Node, Tensor] = {}
    for node in dict.fromkeys(taken):
        value, name = values_of(shadow, node), shadow.value_of.get(node, node).name
        if value is None:
            raise Reject(
                f"rotations are looked up in {name}, whose elements are not known while rewriting", node
            )
        if value.dtype.itemsize < 4:
            raise Reject(
                f"rotations are looked up in {name}, which holds {value.dtype}: wanted float32", node
            )
        found[node] = value
    return found


def _verdict(
    site: Site, slices: Mapping[Side, Slice], nodes: tuple[Node, ...], held: Mapping[Node, Tensor]
) -> Verdict:
    try:
        return Verdict(nodes, _try_out(site, slices, held))
    except Reject as reject:
        return Verdict(nodes, reject)


def _recalled(verdict: Verdict, nodes: tuple[Node, ...]) -> Rotation:
    """The same of nodes that do the same."""
    same, found = dict(zip(verdict.nodes, nodes, strict=True)), verdict.found
    if isinstance(found, Reject):
        raise Reject(found.reason, found.node and same.get(found.node, found.node), found.depth)
    return found.at(same)


def _try_out(site: Site, slices: Mapping[Side, Slice], held: Mapping[Node, Tensor]) -> Rotation:
    for cut in slices.values():
        check_precision(cut)
        check_lengths(cut)
    drawn = trial(site, slices, held, "normal", 0)
    sources = {side: positions(drawn, side) for side in slices}
    named: tuple[tuple[Side, str], ...] = (("q", "queries"), ("k", "keys"))
    for side, name in named:
        if not sources[side]:
            other = "keys" if name == "queries" else "queries"
            raise Reject(f"positions enter the {other} and not the {name}: wanted both, or none", site.root)
    check_law(drawn, sources)
    return _described(trial(site, slices, held, "signs", 1), sources["q"])


def _beside(site: Site) -> Iterator[Node]:
    """Values, and what is multiplied onto queries, keys and values."""
    for name in "qkv":
        operand = site.operands[name]
        if isinstance(operand, Operand):
            yield from (part.node for part in (operand.parts if name == "v" else operand.times))


def slices_of(shadow: Shadow, site: Site) -> Slices:
    """What makes the queries and the keys of a site."""
    return {"q": _slice(shadow, site, "q"), "k": _slice(shadow, site, "k")}


def _slice(shadow: Shadow, site: Site, side: Side) -> Slice:
    operand = bare(site.operands[side])
    length = product(a.size for a in emit.result_of(site).roles.query)
    return slice_above(shadow, tuple(part.node for part in operand.parts), site.root, length)


def _described(drawn: Trial, sources: tuple[Node, ...]) -> Rotation:
    """Which features turn together, how fast and how long they become: drawn features are 1 or -1."""
    q0, q1 = (drawn.run("q", shifted(sources, by)) for by in (0, 1))
    turning = (q0 != q1).flatten(0, 2).any(0).nonzero().flatten()
    start, width = int(turning.min()), int(turning.max() - turning.min() + 1)
    both = (q[..., start : start + width] for q in (q0, q1))
    style, rates, scaling = _pairs(*both, tolerance=tolerance(drawn, 1))
    cut = drawn.slices["q"]
    held = [n for n in cut.leaves if is_float(n) and n in cut.tables and uniform(n) is None]
    return Rotation(
        style, width, start,
        frequencies=held[0] if len(held) == 1 else rates,
        scaling=scaling,
        positions=sources,
        counted=all(map(is_count, sources)),
        apart=turns_apart(drawn, sources),
    )  # fmt: skip


def _pairs(
    before: Tensor, after: Tensor, *, tolerance: float
) -> tuple[Style, tuple[float, ...], float | None]:
    """The style, radians by which each pair turns from `before` to `after` (B, H, N, R), and the scaling."""
    half = before.shape[-1] // 2
    if 2 * half == before.shape[-1]:
        cuts: tuple[tuple[Style, slice, slice], ...] = (
            ("halves", slice(0, half), slice(half, None)), ("neighbours", slice(0, None, 2), slice(1, None, 2))
        )  # fmt: skip
        for style, first, second in cuts:
            a, b = (torch.complex(x[..., first], x[..., second]) for x in (before, after))
            turn = (b / a).flatten(0, 2)
            if float((turn - turn[:1]).abs().max()) <= tolerance:
                length = a.abs() / 2**0.5
                even = float(length.max() - length.min()) <= tolerance
                return style, tuple(turn[0].angle().tolist()), float(length.mean()) if even else None
    return "other", (), None
