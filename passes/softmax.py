"""Reads softmax(f(Q K^T)) V, where f is any mix of scales, masks, biases, a soft cap, casts and views.

How the softmax itself is spelled is a `Form` (softmax_form): one operator, with or without a learned sink
(softmax_sinks), or written out (softmax_exp).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch.fx import Node

from attnopt.passes.contraction import Contraction
from attnopt.passes.layout import Axes, Dims, Space
from attnopt.passes.linear_finite import check_operands
from attnopt.passes.logits import LogitsReader
from attnopt.passes.logits_blended import blended
from attnopt.passes.logits_found import Logits
from attnopt.passes.scores import ScoreReader
from attnopt.passes.scores_factors import on_operands, on_values
from attnopt.passes.site import (
    Filled,
    Operand,
    Result,
    Roles,
    check_unmutated,
    flat,
    outside_uses,
    peel,
    with_dtype,
    working_dtype,
)
from attnopt.passes.sizes import product
from attnopt.passes.softmax_form import Form
from attnopt.passes.softmax_frame import Frame, is_per_query, read_logits, read_result, read_roles, read_sink
from attnopt.passes.softmax_joined import Joined, Product, join, products
from attnopt.passes.softmax_nodes import depends_on
from attnopt.passes.softmax_ones import read_ones
from attnopt.passes.softmax_output import read_output
from attnopt.passes.softmax_sinks import read_softmax
from attnopt.passes.terms import Scores
from attnopt.passes.weights import read_weights
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow
from attnopt.spec import AttentionSpec, EmptyRow, Heads, Precision

aten = torch.ops.aten


class SoftmaxRule:
    """Softmax attention spelled out: softmax(f(Q K^T)) V."""

    name = "softmax"
    anchors = frozenset({aten.softmax.int, aten._softmax.default, aten._safe_softmax.default})

    def read(self, anchor: Node, shadow: Shadow) -> Site:
        """The site around one softmax node. Raises Reject."""
        return site_around(self.name, read_softmax(anchor, shadow), shadow)


def site_around(rule: str, form: Form, shadow: Shadow) -> Site:
    """The site around a softmax of any form: the values below, the scores above, the rest of the output."""
    space, dims, key = form.space, form.dims, form.key
    weights = read_weights(space, shadow, form.start, dims, key)
    output = read_ones(form, shadow, weights) or read_output(form, shadow, weights)
    given = Scores(form.scale, casts=form.casts, fills=form.fills)
    value = output.value or (weights.value, weights.value_dims)
    first = min((node for node in form.inner if form.logits in node.all_input_nodes), default=None)
    reader = ScoreReader(space, shadow, weights=dims, values=value[1], reader=first)
    scores = reader.read(form.logits, dims, given)
    found = products(space, shadow, scores)
    parts = pair(space, scores, *value, dims, key)
    parts = replace(parts, products=found)
    after = frozenset((*weights.path, *output.path))
    interior = frozenset((*scores.path, *form.inner, *after, *output.beside))
    frame = Frame(
        rule, output.root, output.dims, dims, key, interior,
        change=weights.change, sink=output.sink, sharp=form.sharp, after=after,
    )  # fmt: skip
    return replace(build(space, shadow, parts, frame, safe=form.safe), unshifted=form.unshifted)


@dataclass(frozen=True, slots=True)
class Parts:
    """q, k, v as they enter the contractions, with the dtype in which they do, and what is known of the scores.

    products: terms of the scores that are products of queries and keys as well.
    """

    q: tuple[Node, Dims]
    k: tuple[Node, Dims]
    v: tuple[Node, Dims]
    scores: Scores
    entered: torch.dtype
    products: tuple[Product, ...] = ()


def pair(space: Space, scores: Scores, value: Node, value_dims: Dims, weights: Dims, key: Axes) -> Parts:
    """Tells queries from keys: the operand that runs along the softmax is the key.

    Of a single key, which runs along nothing, it is the one that has fewer of the axes of the weights.
    """
    form = scores.form
    if form is None:
        raise Reject("no product of queries and keys above the softmax")
    keys = set(space.leaves(key))
    sides = [(form.lhs, scores.q), (form.rhs, scores.k)]
    along = [bool(keys & set(flat(space, dims))) for _, dims in sides]
    if along == [True, False]:
        sides.reverse()
    elif not keys:
        sides.sort(key=lambda side: -len({*flat(space, side[1])} & {*flat(space, weights)}))
    elif along != [False, True]:
        raise Reject(
            "the product above the softmax does not pair queries with keys", form.node, len(scores.path)
        )
    return Parts(sides[0], sides[1], (value, value_dims), scores, form.node.meta["val"].dtype)


def build(space: Space, shadow: Shadow, parts: Parts, frame: Frame, *, safe: bool) -> Site:
    """The site from its labelled parts: operands peeled, axes sorted, mask and bias told apart, then checked."""
    (q_node, q_dims, q_factor), (k_node, k_dims, k_factor), (v_node, v_dims, v_factor) = _peeled(space, parts)
    if v_factor != 1.0:
        v_node, v_dims = parts.v
    roles = read_roles(space, frame, parts.scores, (q_dims, k_dims, v_dims))
    _need_own_keys(space, roles, (k_node, k_dims), v_dims)
    parts = replace(parts, scores=blended(LogitsReader(space, roles), parts.scores))
    scale = parts.scores.scale * q_factor * k_factor
    joined = join(space, roles, parts.scores, parts.products, scale)
    roles = replace(roles, more=(*joined.width, *(frame.sink.several if frame.sink else ())))
    frame = replace(frame, interior=frame.interior | joined.path)
    logits = read_logits(LogitsReader(space, roles, frame.given, safe), joined.scores, frame)
    dtype = _dtype(parts, frame.root, (q_node, k_node, v_node), joined)
    times, key_times = on_operands(space, roles, parts.scores.factors)
    q = Operand(
        q_node, space.resolve(q_dims), times=times, rsqrt=space.leaves(parts.scores.rsqrt), beside=joined.q
    )
    k = Operand(k_node, space.resolve(k_dims), times=(*key_times, *logits.keys), beside=joined.k)
    v_times = (*on_values(space, roles, frame.change.values), *logits.values)
    v = Operand(v_node, space.resolve(v_dims), times=v_times)
    spec = _spec(parts.scores, scale, roles, logits, frame)
    q, k, v = (with_dtype(operand, dtype) for operand in (q, k, v))
    operands: dict[str, Operand | Filled] = {"q": q, "k": k, "v": v, **logits.operands}
    if logits.slopes is not None:
        operands["slopes"] = logits.slopes
    if frame.sink is not None:
        operands["sink_logits"] = sink = read_sink(space, roles, frame.sink, parts.scores.shift)
        spec = replace(spec, sink_logits=True, sink_per_query=is_per_query(sink))
    result = read_result(space, roles, frame)
    _check(shadow, operands, spec, frame, result)
    needless = _single_key(roles, frame) or _needless(shadow, frame, operands, result)
    site = Site(
        frame.rule, frame.root, spec, operands, result, frame.interior,
        needless=needless, forward_only=logits.forward_only,
    )  # fmt: skip
    return replace(
        site, otherwise=(*_in_other_words(site, logits), *_with_tensors(shadow, site, logits, frame, result))
    )


def _in_other_words(site: Site, logits: Logits) -> Iterator[Site]:
    """The site with less proven of its mask."""
    masks = set(logits.mask.operand_names())
    rest = {name: operand for name, operand in site.operands.items() if name not in masks}
    for mask, tensors in logits.otherwise:
        yield replace(site, spec=replace(site.spec, mask=mask), operands={**rest, **tensors})


def _with_tensors(shadow: Shadow, site: Site, logits: Logits, frame: Frame, result: Result) -> Iterator[Site]:
    """The site with a tensor in the place of a bias that was proven to be linear, in all words for its mask."""
    plain = logits.plain
    if plain is None:
        return
    empty = EmptyRow.ZERO if plain.empty_row is EmptyRow.ZERO else site.spec.empty_row
    spec = replace(site.spec, mask=plain.mask, bias=plain.bias, alibi=None, empty_row=empty)
    lined = {*logits.operands, "slopes"}
    held = {name: x for name, x in site.operands.items() if isinstance(x, Operand | Filled)}
    kept = {name: x for name, x in held.items() if name not in lined}
    other = replace(site, spec=spec, operands={**kept, **plain.operands})
    try:
        _check(shadow, {**kept, **plain.operands}, spec, frame, result)
    except Reject:
        return
    yield other
    yield from _in_other_words(other, plain)


def _need_own_keys(space: Space, roles: Roles, keys: tuple[Node, Dims], values: Dims) -> None:
    """A router: one matrix scores every token by itself, and weighs values which that token alone has made."""
    node, dims = keys
    alike = not {*roles.batch, *roles.kv_heads} & set(flat(space, dims))
    if not roles.query and alike and {*roles.batch, *roles.kv_heads} & set(flat(space, values)):
        raise Reject("each token is weighed by itself against one matrix: a router, not attention", node)


def _peeled(space: Space, parts: Parts) -> list[tuple[Node, Dims, float]]:
    """q, k and v, each with axes and factor; as they entered, where an axis would be lost that all had expanded."""
    entered = (parts.q, parts.k, parts.v)
    peeled = [peel(space, *part) for part in entered]
    for n, (node, dims) in enumerate(entered):
        held = {a for _, axes, _ in peeled for a in flat(space, axes)}
        if not held >= set(flat(space, dims)):
            peeled[n] = node, space.resolve(dims), 1.0
    return peeled


def _single_key(roles: Roles, frame: Frame) -> str:
    """Why nothing is to be saved where there is one key: the gradients of the scores are exactly 0, too."""
    if roles.key or frame.sink is not None:
        return ""
    return (
        "there is a single key, whose weight does not depend on its score: nothing is left for a kernel to do"
    )


def _needless(shadow: Shadow, frame: Frame, operands: Mapping[str, Operand | Filled], result: Result) -> str:
    """Why a call would save nothing: the weights, or the scores, have to be computed anyway."""
    for node, user in outside_uses(shadow, frame.interior, frame.root):
        if node in frame.after:
            return f"the attention weights ({node.name}) are also {user}, so they must be computed anyway"
    named = [(name, o) for name, o in operands.items() if isinstance(o, Operand)]
    for name, operand in (*named, *(("a factor", o) for o in result.times)):
        for part in operand.parts:
            if depends_on(shadow, part.node, frame.interior):
                return f"{name} ({part.node.name}) is made of the scores, so they must be computed anyway"
    return ""


def _dtype(parts: Parts, root: Node, bases: tuple[Node, Node, Node], joined: Joined) -> torch.dtype:
    q, k, v = bases
    out = root.meta["val"].dtype
    paired = [q, k, *(part.node for part in (*joined.q, *joined.k))]
    working = working_dtype([*((node, parts.entered) for node in paired), (v, out)], out)
    if (
        parts.scores.factors or parts.scores.rsqrt
    ):  # multiplied onto q: as precisely as the graph multiplies the scores
        return torch.promote_types(working, parts.entered)
    return working


def _spec(scores: Scores, scale: float, roles: Roles, logits: Logits, frame: Frame) -> AttentionSpec:
    root = frame.root
    if not isfinite(scale):
        raise Reject(f"the scores are scaled by {scale}", root)
    form: Contraction | None = scores.form
    held = form.node.meta["val"].dtype if form is not None else None
    heads = Heads(int(product(a.size for a in roles.share)))
    return AttentionSpec(
        "softmax", scale, heads, logits.mask, logits.empty_row, logits.bias, scores.softcap,
        dropout=frame.change.dropout, alibi=logits.alibi, hidden_logit=logits.hidden_logit,
        precision=Precision(scores=held, out=root.meta["val"].dtype),
    )  # fmt: skip


def _check_whole(name: str, operand: Operand, roles: Roles) -> None:
    """Several axes merge into one dimension without a copy only if the operand has all of them, or none.

    Keys and values are copied where they are repeated along different heads: so the graph does.
    """
    held = {a for axes in operand.dims for a in axes}
    for group in roles.layout(name):
        copied = name != "q" and group == roles.kv_heads
        if held & {*group} and not held >= {*group} and not copied:
            raise Reject(
                f"{name} has some of the axes of its batch or heads, and would be copied along the others",
                operand.node,
                9,
            )


def _check(
    shadow: Shadow,
    operands: Mapping[str, Operand | Filled],
    spec: AttentionSpec,
    frame: Frame,
    result: Result,
) -> None:
    tensors = {name: o for name, o in operands.items() if isinstance(o, Operand)}
    devices = {o.node.meta["val"].device for o in tensors.values()}
    if len(devices) != 1:
        raise Reject(f"operands on different devices: {', '.join(sorted(map(str, devices)))}", frame.root, 9)
    if set(operands) != set(spec.operand_names()):
        raise Reject(f"read {sorted(operands)} but the spec names {sorted(spec.operand_names())}", frame.root)
    for name in "qkv":
        _check_whole(name, tensors[name], result.roles)
        if depends_on(shadow, tensors[name].node, frame.interior):
            raise Reject(f"{name} is made from the scores", tensors[name].node, 9)
    check_operands(tensors)
    factors = {f"factor {n}": o for n, o in enumerate(result.times)}
    check_unmutated({**tensors, **factors}, frame.root, frame.interior)


RULE = SoftmaxRule()
