"""Reads linear attention that is spelled as a loop over blocks or tokens, in chunks, or through running sums.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

(Katharopoulos et al. 2020, arXiv:2006.16236, eq. 16-20; with decay Sun et al. 2023, arXiv:2307.08621, eq. 6 and 7; by
blocks Qin et al. 2024, arXiv:2401.04658, Algorithm 1; per token Dao and Gu 2024, arXiv:2405.21060, section 6.)

There are too many ways to write this to read each, so a loop is read in two parts.

By reading: which nodes are the loop, that they are nothing but arithmetic without corners (sums, products,
exponentials, views, writes at fixed places, masks by position), that everything which enters is an operand of the
site or a constant, and that nothing inside is needed elsewhere but the last state. Hence the loop is an analytic
function of its operands.

By checking: which function that is. Roles come from its Jacobian, the decay from its weights, both measured at
random points in fp64; then the loop is compared with the recurrence above at other random points, at the graph's own
sizes, but that of what it treats alike (batch, heads, features of values) only a few elements are tried. Two analytic
functions that differ at all differ almost everywhere, so agreement at random points says that they are one, up to the
1e-9 of the comparison; the trials draw decays so gentle that the first position still counts at the last one. Where a
length is symbolic the graph's guards fix the number of turns of the loop, and two lengths are tried.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.linear_loop_alike import Shapes
from attnopt.passes.linear_loop_constants import check_constants
from attnopt.passes.linear_loop_decay import (
    Found,
    above,
    check_positive,
    differing_head,
    find,
    measure,
    rounded,
)
from attnopt.passes.linear_loop_few import few
from attnopt.passes.linear_loop_numbers import common, factors, powers
from attnopt.passes.linear_loop_probe import Draw, Trial, patterns, probe, run
from attnopt.passes.linear_loop_reading import Reading, moved, normal_form
from attnopt.passes.linear_loop_roles import Cast, Labels, cast_of, label
from attnopt.passes.linear_loop_site import NAME, build, check_trials
from attnopt.passes.linear_loop_tables import Table, tables_of
from attnopt.passes.linear_product import product_of
from attnopt.passes.mask_writes import arguments
from attnopt.passes.reroll import Candidate, candidates, numerators, regions
from attnopt.passes.reroll_cut import Region
from attnopt.passes.reroll_facts import CORNERED, MADE
from attnopt.passes.reroll_sizes import name_of
from attnopt.passes.reroll_writes import check_writes
from attnopt.passes.sizes import hint, shape_of
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow

aten = torch.ops.aten

#: Where the loops of a graph are kept while it is read: in the metadata of its shadow.
_KEY = "attnopt_loops"
#: The depth of a Reject from which on it is certain that a loop is a recurrence with queries, keys and values.
SURE = 2
#: More numbers than the tensors that enter a loop may hold in a trial.
LARGEST = 2**28


class LoopRule:
    """Linear attention as a loop, in chunks or through running sums."""

    name = NAME
    anchors = frozenset(
        {
            aten.cat.default, aten.stack.default, aten.add.Tensor, aten.matmul.default, aten.bmm.default,
            aten.baddbmm.default, aten.einsum.default, aten.sum.dim_IntList, aten.mul.Tensor, aten.div.Tensor,
            aten.zeros.default, aten.zeros_like.default, aten.empty.memory_format, aten.empty_like.default,
            aten.new_zeros.default, aten.new_empty.default, aten.reshape.default, aten.view.default,
            aten.flatten.using_ints, aten._unsafe_view.default, aten.permute.default, aten.transpose.int,
            aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor,
        }
    )  # fmt: skip

    def read(self, anchor: Node, shadow: Shadow) -> Site:
        """The site whose root is `anchor`. Raises Reject, of depth -1 where no loop ends here."""
        found = _loops(shadow).get(anchor)
        if found is None:
            raise Reject("no loop over positions ends here", anchor, -1)
        if isinstance(found, Reject):
            raise found
        return found


def _loops(shadow: Shadow) -> Mapping[Node, Site | Reject]:
    """All loops of the graph, by root; found once."""
    held: dict[Node, Site | Reject] | None = shadow.module.meta.get(_KEY)
    if held is None:
        held = dict(_found(shadow))
        shadow.module.meta[_KEY] = held
    return held


def _found(shadow: Shadow) -> Iterator[tuple[Node, Site | Reject]]:
    covered: set[Node] = set()
    known: Known = {}
    for candidate in sorted(candidates(shadow), key=lambda c: -shadow.order[c.sink]):
        if candidate.sink in covered:
            continue
        verdict, inside = _read_or_above(shadow, candidate, known)
        if verdict is not None:
            root = verdict.root if isinstance(verdict, Site) else candidate.roots[0]
            covered |= inside
            yield root, verdict


def _read_or_above(
    shadow: Shadow, candidate: Candidate, known: "Known"
) -> tuple[Site | Reject | None, frozenset[Node]]:
    """As `_read`; where there is no site, that of what is divided by a sum, or multiplied with its inverse."""
    verdict, inside = _read(shadow, candidate, known)
    if isinstance(verdict, Site):
        return verdict, inside
    others = (_read(shadow, numerator, known) for numerator in numerators(candidate))
    return next((found for found in others if isinstance(found[0], Site)), (verdict, inside))


def _read(
    shadow: Shadow, candidate: Candidate, known: "Known"
) -> tuple[Site | Reject | None, frozenset[Node]]:
    """A site, or why the furthest reading is none; None where there is nothing like a loop."""
    try:
        found = regions(shadow, candidate)
    except Reject as reject:
        return (reject, frozenset()) if reject.depth >= SURE else (None, frozenset())
    reasons: list[Reject] = []
    for region in found:
        try:
            return read_region(shadow, region, known), frozenset(region.nodes)
        except Reject as reject:
            if reject.depth < SURE:
                continue  # sums of products are found in much that is no attention
            inside = frozenset({*region.nodes, *([region.state] if region.state is not None else [])})
            reasons.append(Reject(reject.reason, reject.node or region.root, reject.depth, inside))
    if not reasons:
        return None, frozenset()
    best = max(reasons, key=lambda reject: reject.depth)
    return best, best.inside


#: Normal form of a region -> its reading, or why there is none: layers of a model are alike.
Known = dict[str, "Reading | Reject"]


def read_region(shadow: Shadow, region: Region, known: Known) -> Site:
    """The site of one region; `known`: what equal ones were read as. Raises Reject."""
    if not region.leaks:
        _check_smooth(region)
    tables = tuple(tables_of(shadow, region.leaves))
    key, order = normal_form(region, tables)
    if key not in known:
        known[key] = _read_and_try(region, tables)
    found = known[key]
    if isinstance(found, Reject):
        raise Reject(found.reason, region.leaks[0] if region.leaks else region.root, found.depth)
    check_writes(region, (node for t in tables for node in (t.node, t.base)), SURE + 2)
    _, theirs = normal_form(found.region, found.tables)
    return build(moved(found, region, tables, dict(zip(theirs, order, strict=True))))


def _read_and_try(region: Region, tables: tuple[Table, ...]) -> "Reading | Reject":
    try:
        factors(region)
        shapes = few(region, tables)
        _check_size(region, shapes)
        with torch.inference_mode(mode=False), torch.enable_grad():
            reading = _read_roles(region, tables, shapes)
        check_constants(region, shapes)
        check_trials(reading, build(reading))
    except Reject as reject:
        return reject
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError) as problem:
        return Reject(f"the loop could not be tried out: {type(problem).__name__}: {problem}", region.root, 1)
    return reading


def _read_roles(region: Region, tables: tuple[Table, ...], shapes: Shapes) -> Reading:
    trial = run(region, tables, Draw(10), shapes, gradients=True)
    cast = cast_of(region, trial, tables)
    if region.leaks:
        raise Reject("several inner values of the loop are used outside it", region.root, SURE)
    labels = label(region, cast, differing_head(region, cast, trial))
    measured = measure(region, trial, cast, labels)
    decay = find(region, trial, cast, labels, measured.steps, _decay_candidates(region, cast, tables))
    _check_others(region, cast, tables, decay)
    if decay is not None and decay.function == "log" and decay.node is not None:
        check_positive(region, decay.node)
    state = None if region.state is None else _state_dims(region, trial, cast, labels)
    found = tuple(
        powers(region, node, trial.values, run(region, tables, Draw(10, doubled=node), shapes).values)
        for node in factors(region)
    )
    scale = rounded(measured.scale / common(found, trial.values))
    return Reading(region, tables, cast, labels, decay, scale, state, shapes, found)


def _check_smooth(region: Region) -> None:
    """Raises Reject where the loop is no analytic function of what enters it."""
    data = set(region.leaves)
    for node in region.nodes:
        if data.isdisjoint(node.all_input_nodes):
            continue
        data.add(node)
        if name_of(node) in CORNERED:
            if any(map(_sums_products, region.nodes)):
                raise Reject(
                    f"linear attention through running sums of keys times values, which also takes {name_of(node)}: "
                    "no kernel states that",
                    node,
                    SURE,
                )
            raise Reject(f"a loop over positions that takes {name_of(node)}: not linear attention", node, 1)
        if arguments(node).get("mask") in data or arguments(node).get("condition") in data:
            raise Reject("a loop over positions that decides by data what it adds", node, 1)
        if _leaves_steps(node):
            raise Reject(
                f"a loop over positions that makes whole numbers, or truths, of data ({node.name}); "
                "keep them floating point",
                node,
                1,
            )
    for leaf in region.leaves:
        if not leaf.meta["val"].is_floating_point():
            raise Reject(
                f"{leaf.name}, which is no floating-point tensor, enters a loop over positions", leaf, 1
            )


def _leaves_steps(node: Node) -> bool:
    """Whether the result is constant between steps: a cast to whole numbers, a comparison, a rounded quotient."""
    value = node.meta.get("val")
    whole = isinstance(value, Tensor) and not value.is_floating_point() and name_of(node) not in MADE
    return whole or bool(arguments(node).get("rounding_mode"))


def _check_size(region: Region, shapes: Shapes) -> None:
    if sum(prod(map(hint, shapes.get(leaf, leaf.meta["val"].shape))) for leaf in region.leaves) > LARGEST:
        raise Reject("a loop over positions that is too large to be tried out", region.root, SURE)


def _decay_candidates(region: Region, cast: Cast, tables: Sequence[Table]) -> list[Node]:
    """Tensors that may hold the decay of each head: what enters, then what is made of it or of constants."""
    bases = [table.base for table in tables]
    made = [n for n in region.nodes if n not in region.mixed]
    return list(dict.fromkeys([*bases, *cast.others, *cast.gates, *made]))


def _check_others(region: Region, cast: Cast, tables: Sequence[Table], decay: Found | None) -> None:
    """Everything that enters must be an operand, or follow from one."""
    known = {cast.q, cast.k, cast.v, cast.state, *(t.node for t in tables)}
    if decay is not None and decay.node is not None:
        known |= above(decay.node, region)
    for leaf in region.leaves:
        if leaf not in known and leaf in cast.patterns:
            raise Reject(f"{leaf.name} enters the loop beside queries, keys, values and the decay", leaf, 2)


def _sums_products(node: Node) -> bool:
    return name_of(node) == "cumsum" and any(
        product_of(source) is not None for source in node.all_input_nodes
    )


def _state_dims(region: Region, trial: Trial, cast: Cast, labels: Labels) -> tuple[object, ...]:
    """The dimensions of the last state. Raises Reject where it is something else."""
    state = region.state
    if state is None or not isinstance(trial.values.get(state), Tensor):
        raise Reject("an inner value of the loop is used outside it, and it is not its last state", state, 2)
    found = patterns(trial.values[state].shape, probe(trial, state, [cast.k, cast.v], -1))
    axes: dict[int, object] = {}
    for leaf in (cast.k, cast.v):
        for pattern, dims in zip(found[leaf] or (), labels.by[leaf], strict=False):
            if pattern[0] == "at" and axes.setdefault(pattern[1], dims) != dims:
                raise Reject("the last state has dimensions that cannot be told apart", state, 2)
    shape = shape_of(state)
    if any(d not in axes and n != 1 for d, n in enumerate(shape)):
        raise Reject(
            f"an inner value of the loop ({state.name}) is used outside it, and it is not its last state",
            state,
            2,
        )
    return tuple(axes.get(d, ()) for d in range(len(shape)))


RULE = LoopRule()
