"""Reads linear attention: (Q K^T * M) V without a softmax, and Q (K^T V); M a mask or a decay, perhaps normalised.

Linear attention: Katharopoulos et al. 2020, arXiv:2006.16236, eq. 4 and 8; with decay: Sun et al. 2023,
arXiv:2307.08621, eq. 5, and Qin et al. 2024, arXiv:2401.04658, eq. 3.
"""

from dataclasses import dataclass, replace
from math import isclose, isfinite

import torch
from torch.fx import Node

from attnopt.mask import FULL
from attnopt.passes.linear_finite import check_decay, check_finite, check_operands
from attnopt.passes.linear_roles import role_candidates
from attnopt.passes.linear_structure import Ending, Structure, endings, structures
from attnopt.passes.linear_sum import SumReader, as_site_axes
from attnopt.passes.linear_weights import Weights, WeightsReader
from attnopt.passes.mask_writes import writes_after
from attnopt.passes.site import (
    Filled,
    Operand,
    Result,
    Roles,
    check_inside,
    check_unmutated,
    with_dtype,
    working_dtype,
)
from attnopt.passes.sizes import product
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow
from attnopt.spec import AttentionSpec, Decay, Heads, Normaliser, Precision

aten = torch.ops.aten


class LinearRule:
    """Linear attention: a product of queries, keys and values, in either order, weighed by no more than a decay."""

    name = "linear"
    anchors = frozenset(
        {
            *(
                aten.matmul.default,
                aten.bmm.default,
                aten.mm.default,
                aten.baddbmm.default,
                aten.einsum.default,
            ),
            aten.sum.dim_IntList,
        }
    )

    def read(self, anchor: Node, shadow: Shadow) -> Site:
        """The site whose last product is `anchor`. Raises Reject, of depth -1 where it is no linear attention."""
        reasons = [Reject("no product of queries, keys and values", anchor, -1)]
        sites: list[Site] = []
        for structure in structures(shadow, anchor):
            try:
                sites.append(_site(shadow, structure))
            except Reject as reject:
                reasons.append(Reject(reject.reason, reject.node or anchor, structure.depth))
                continue
            if not sites[-1].needless:
                return sites[-1]
        if sites:
            return sites[0]
        raise max(reasons, key=lambda reject: reject.depth)


def _site(shadow: Shadow, found: Structure) -> Site:
    """The first reading, of all roles and endings, that is proven; of the reasons, that which got furthest.

    A reading that leaves the call something to save goes before one that does not.
    """
    if found.weighting.strange:
        raise Reject(*found.weighting.strange[0])
    reasons: list[Reject] = []
    needless: list[Site] = []
    for ending in endings(shadow, found):
        for roles in role_candidates(found.trio, found.weighed):
            try:
                proven = _prove(found, ending, roles)
            except Reject as reject:
                reasons.append(reject)
                continue
            try:
                site = _build(shadow, _Reading(found, ending, roles, proven))
            except Reject as reject:
                reasons.append(Reject(reject.reason, reject.node, 3 if ending.divisor else 1))
                continue
            if not site.needless:
                return site
            needless.append(site)
    if needless:
        return needless[0]
    raise max(reasons, key=lambda reject: reject.depth)


@dataclass(frozen=True, slots=True)
class Proven:
    """o = rest * (weights v) / normaliser(sum of weights), weights with `scale`; path: what computes the normaliser."""

    weights: Weights
    scale: float
    normaliser: Normaliser | None = None
    rest: float = 1.0
    path: tuple[Node, ...] = ()


def _prove(found: Structure, ending: Ending, roles: Roles) -> Proven:
    """Weights and normaliser under one assignment of roles. Raises Reject."""
    reader = WeightsReader(found.space, roles, found.root)
    weights = reader.read(ending.weighting)
    divisor = ending.divisor
    if divisor is None:
        return Proven(weights, weights.scale)
    total = SumReader(found.space, frozenset({found.trio.q.node, found.trio.k.node})).read(divisor.sum)
    summed = reader.read(as_site_axes(found.space, total, found.trio))
    if not summed.agrees_with(weights):  # unless the sum has the factors of the output as well
        weights = weights.factors_first()
    if not summed.agrees_with(weights):
        raise Reject(
            "what the output is divided by sums other weights than those of the values", divisor.sum.node, 2
        )
    below = summed.scale * divisor.factor
    if below == 0 or not isfinite(divisor.eps):
        raise Reject(
            f"the output is divided by {below:g} times the sum of the weights, plus {divisor.eps:g}",
            ending.root,
            2,
        )
    rest = weights.scale / below
    # Equal but for the order in which the factors were multiplied.
    rest = 1.0 if isclose(rest, 1.0, rel_tol=1e-12) else rest
    path = (*divisor.path, *total.weighting.path)
    detached = divisor.detached or total.detached
    normaliser = Normaliser(divisor.eps, divisor.floor, divisor.signed, detached)
    return Proven(weights, summed.scale, normaliser, rest, path)


@dataclass(frozen=True, slots=True)
class _Reading:
    """One site, read completely."""

    found: Structure
    ending: Ending
    roles: Roles
    proven: Proven


def _build(shadow: Shadow, r: _Reading) -> Site:
    spec, operands, root = _spec(r), _operands(r), r.ending.root
    interior = frozenset((*r.found.weighting.path, *r.ending.path, *_dependent(r)))
    weights = r.proven.weights
    _check(operands, weights.on_out, spec, root)
    check_finite((*weights.on_q, *weights.on_k))
    _check_path(r)
    dims, times = r.found.space.resolve(r.ending.out), weights.on_out
    result = Result(r.roles, dims, root.meta["val"].dtype, times=times)
    return Site(
        LinearRule.name,
        root,
        spec,
        operands,
        result,
        interior - {root},
        needless=_needless(shadow, interior, r),
    )


def _needless(shadow: Shadow, interior: frozenset[Node], r: _Reading) -> str:
    """Why a call would save nothing where the graph returns inner values; Reject where anything else uses them."""
    returned = [node for node in sorted(interior - {r.ending.root}) if node in shadow.results]
    check_inside(shadow, interior, r.ending.root, frozenset(returned))
    weighting = r.found.weighting
    scores = weighting.path[-1] if weighting.factors or weighting.gates or weighting.triangles else None
    for node in returned:
        if node is not scores:
            return (
                f"an inner value ({node.name}) is also returned by the graph, so it must be computed anyway"
            )
    return ""


def _operands(r: _Reading) -> dict[str, Operand | Filled]:
    bases = r.found.trio.bases
    entered = [(base.node, base.end.user.meta["val"].dtype) for base in bases]
    dtype = working_dtype(entered, r.ending.root.meta["val"].dtype)
    q, k, v = (with_dtype(Operand(b.node, r.found.space.resolve(b.dims)), dtype) for b in bases)
    weights = r.proven.weights
    return {
        "q": replace(q, times=weights.on_q),
        "k": replace(k, times=weights.on_k),
        "v": replace(v, factor=r.proven.rest),
        **weights.operands,
    }


def _spec(r: _Reading) -> AttentionSpec:
    root, weights, normaliser = r.ending.root, r.proven.weights, r.proven.normaliser
    share = product(a.size for a in r.roles.share)
    if not isfinite(r.proven.scale) or not isfinite(r.proven.rest):
        raise Reject(f"the weights are scaled by {r.proven.scale} and the values by {r.proven.rest}", root)
    if not isinstance(share, int):
        raise Reject("the number of query heads to a key head is symbolic", root)
    if r.found.depth < 0 and (weights.mask, weights.decay, normaliser) == (FULL, Decay.NONE, None):
        raise Reject("three matrices are multiplied; nothing says that it is attention", root)
    held = Precision(scores=r.found.trio.q.end.user.meta["val"].dtype, out=root.meta["val"].dtype)
    return AttentionSpec(
        "linear",
        r.proven.scale,
        Heads(share),
        weights.mask,
        decay=weights.decay,
        normaliser=normaliser,
        precision=held,
    )


def _dependent(r: _Reading) -> list[Node]:
    """Nodes beside the way from Q K^T to the output that take the weights, such as those of the normaliser."""
    beside = {*r.proven.path, *r.found.weighting.beside}
    inside = {*r.found.weighting.path, *r.ending.path}
    for node in sorted(beside):
        if inside.intersection(node.all_input_nodes):
            inside.add(node)
    return [node for node in beside if node in inside]


def _check(
    operands: dict[str, Operand | Filled], factors: tuple[Operand, ...], spec: AttentionSpec, root: Node
) -> None:
    tensors = {name: o for name, o in operands.items() if isinstance(o, Operand)}
    devices = {o.node.meta["val"].device for o in tensors.values()}
    if len(devices) != 1:
        raise Reject(f"operands on different devices: {', '.join(sorted(map(str, devices)))}", root)
    if set(operands) != set(spec.operand_names()):
        raise Reject(f"read {sorted(operands)} but the spec names {sorted(spec.operand_names())}", root)
    check_operands(tensors)
    if "log_decay" in operands:
        check_decay(operands["log_decay"])
    check_unmutated({**tensors, **{f"factor {n} of the output": o for n, o in enumerate(factors)}}, root)


def _check_path(r: _Reading) -> None:
    """What computes the normaliser must hold, when it is read, what was read from it."""
    passed = {*r.found.weighting.path, *r.ending.path, *r.proven.path}
    for node in r.proven.path:
        for late in writes_after(node, r.ending.root):
            if late not in passed:
                raise Reject(f"the normaliser ({node.name}) is written to in place", late)


RULE = LinearRule()
