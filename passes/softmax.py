"""Reads softmax(f(Q K^T)) V, where f is any mix of scales, masks, biases, a soft cap, casts and views."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch.fx import Node

from attnopt.mask import FULL, Mask
from attnopt.passes.contraction import Contraction
from attnopt.passes.layout import Dims, Space, input_node
from attnopt.passes.logits import Logits, LogitsReader
from attnopt.passes.scores import ScoreReader
from attnopt.passes.site import (
    Operand,
    Result,
    Roles,
    assign_roles,
    check_inside,
    check_unmutated,
    flat,
    peel,
    with_dtype,
    working_dtype,
)
from attnopt.passes.sizes import product, shape_of
from attnopt.passes.terms import Cast, Scores, Term
from attnopt.passes.weights import read_weights
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow
from attnopt.spec import AttentionSpec, Heads, Precision

aten = torch.ops.aten


class SoftmaxRule:
    """Softmax attention spelled out: softmax(f(Q K^T)) V."""

    name = "softmax"
    anchors = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})

    def read(self, anchor: Node, shadow: Shadow) -> Site:
        """The site around one softmax node. Raises Reject."""
        space = Space()
        dims = tuple(space.fresh(size) for size in shape_of(anchor))
        key = dims[int(anchor.args[1])] if dims else ()  # type: ignore[arg-type]
        if not key:
            raise Reject("the softmax runs over a single element", anchor)
        weights = read_weights(space, shadow, anchor, dims, key)
        cast = Cast(anchor.meta["val"].dtype, 1.0)  # softmax(x, dim, dtype) casts x first
        scores = ScoreReader(space, shadow).read(input_node(anchor), dims, Scores(casts=(cast,)))
        parts = pair(space, scores, weights.value, weights.value_dims, key)
        frame = Frame(
            self.name,
            weights.form.node,
            weights.out_dims,
            dims,
            key,
            frozenset((*scores.path, *weights.path)),
        )
        return build(space, shadow, parts, frame, safe=anchor.target is aten._safe_softmax.default)


@dataclass(frozen=True, slots=True)
class Frame:
    """Where a site sits: the rule, the root with its dimensions, those of the weights, the key axis, inner nodes."""

    rule: str
    root: Node
    out: Dims
    weights: Dims
    key: tuple[object, ...]
    interior: frozenset[Node]
    given: Mask = FULL  # what the call says of its mask without a tensor


@dataclass(frozen=True, slots=True)
class Parts:
    """q, k, v as they enter the contractions, with the dtype in which they do, and what is known of the scores."""

    q: tuple[Node, Dims]
    k: tuple[Node, Dims]
    v: tuple[Node, Dims]
    scores: Scores
    entered: torch.dtype


def pair(
    space: Space, scores: Scores, value: Node, value_dims: Dims, key: Dims | tuple[object, ...]
) -> Parts:
    """Tells queries from keys: the operand that runs along the softmax is the key."""
    form = scores.form
    if form is None:
        raise Reject("no product of queries and keys above the softmax")
    keys = set(space.leaves(key))  # type: ignore[arg-type]
    sides = [(form.lhs, scores.q), (form.rhs, scores.k)]
    along = [bool(keys & set(flat(space, dims))) for _, dims in sides]
    if along == [True, False]:
        sides.reverse()
    elif along != [False, True]:
        raise Reject(
            "the product above the softmax does not pair queries with keys", form.node, len(scores.path)
        )
    return Parts(sides[0], sides[1], (value, value_dims), scores, form.node.meta["val"].dtype)


def build(space: Space, shadow: Shadow, parts: Parts, frame: Frame, *, safe: bool) -> Site:
    """The site from its labelled parts: operands peeled, axes sorted, mask and bias told apart, then checked."""
    q_node, q_dims, q_factor = peel(space, *parts.q)
    k_node, k_dims, k_factor = peel(space, *parts.k)
    v_node, v_dims, v_factor = peel(space, *parts.v)
    if v_factor != 1.0:
        v_node, v_dims = parts.v
    roles = assign_roles(space, q_dims, k_dims, v_dims, frame.weights, frame.key)  # type: ignore[arg-type]
    logits = LogitsReader(space, roles, frame.given, safe).read(parts.scores.fills, parts.scores.terms)
    dtype = _dtype(parts, frame.root, (q_node, k_node, v_node))
    times = tuple(_factor(space, roles, term) for term in parts.scores.factors)
    q = Operand(q_node, space.resolve(q_dims), times=times, rsqrt=space.leaves(parts.scores.rsqrt))
    k, v = (with_dtype(Operand(n, space.resolve(d)), dtype) for n, d in ((k_node, k_dims), (v_node, v_dims)))
    spec = _spec(parts.scores, parts.scores.scale * q_factor * k_factor, roles, logits, frame.root)
    operands = {"q": with_dtype(q, dtype), "k": k, "v": v, **logits.operands}
    _check(shadow, operands, spec, frame, roles)
    result = Result(roles, space.resolve(frame.out), frame.root.meta["val"].dtype)
    return Site(frame.rule, frame.root, spec, operands, result, frame.interior)


def _dtype(parts: Parts, root: Node, bases: tuple[Node, Node, Node]) -> torch.dtype:
    q, k, v = bases
    out = root.meta["val"].dtype
    working = working_dtype([(q, parts.entered), (k, parts.entered), (v, out)], out)
    if (
        parts.scores.factors or parts.scores.rsqrt
    ):  # multiplied onto q: as precisely as the graph multiplies the scores
        return torch.promote_types(working, parts.entered)
    return working


def _factor(space: Space, roles: Roles, term: Term) -> Operand:
    """A tensor that multiplies the scores can multiply the queries, if it does not vary along the keys."""
    dims = space.resolve(term.dims)
    if {a for axes in dims for a in axes} - {*roles.batch, *roles.heads, *roles.query}:
        raise Reject("the scores are multiplied by a tensor that varies along the keys", term.node)
    return Operand(term.node, dims, term.factor, inverse=term.inverse)


def _spec(scores: Scores, scale: float, roles: Roles, logits: Logits, root: Node) -> AttentionSpec:
    share = product(a.size for a in roles.share)
    if not isfinite(scale):
        raise Reject(f"the scores are scaled by {scale}", root)
    if not isinstance(share, int):
        raise Reject("the number of query heads to a key head is symbolic", root)
    form: Contraction | None = scores.form
    held = form.node.meta["val"].dtype if form is not None else None
    return AttentionSpec(
        "softmax", scale, Heads(share), logits.mask, logits.empty_row, logits.bias, scores.softcap,
        precision=Precision(scores=held, out=root.meta["val"].dtype),
    )  # fmt: skip


def _check_whole(name: str, operand: Operand, roles: Roles) -> None:
    """Several axes merge into one dimension without a copy only if the operand has all of them, or none."""
    held = {a for axes in operand.dims for a in axes}
    for group in roles.layout(name):
        if held & {*group} and not held >= {*group}:
            raise Reject(
                f"{name} has some of the axes of its batch or heads, and would be copied along the others",
                operand.node,
            )


def _check(
    shadow: Shadow, operands: Mapping[str, Operand], spec: AttentionSpec, frame: Frame, roles: Roles
) -> None:
    devices = {o.node.meta["val"].device for o in operands.values()}
    if len(devices) != 1:
        raise Reject(f"operands on different devices: {', '.join(sorted(map(str, devices)))}", frame.root)
    if set(operands) != set(spec.operand_names()):
        raise Reject(f"read {sorted(operands)} but the spec names {sorted(spec.operand_names())}", frame.root)
    for name in "qkv":
        _check_whole(name, operands[name], roles)
        if operands[name].node in frame.interior:
            raise Reject(f"{name} is made from the scores", operands[name].node)
    check_inside(shadow, frame.interior, frame.root)
    check_unmutated(operands, frame.root)


RULE = SoftmaxRule()
