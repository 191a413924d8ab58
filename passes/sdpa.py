"""Reads scaled_dot_product_attention nodes: top-left causal, zeros for rows that see no key, optional GQA."""

from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch.fx import Node

from attnopt.mask import FULL, TOP_LEFT, Causal
from attnopt.passes.layout import Axes, Dims, Space, broadcast_up
from attnopt.passes.mask_writes import arguments
from attnopt.passes.sizes import Size, is_one, product, same, shape_of
from attnopt.passes.softmax import Parts, build
from attnopt.passes.softmax_frame import Frame
from attnopt.passes.terms import Fill, Scores, Term
from attnopt.passes.weights import Change
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow

aten = torch.ops.aten

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


#: What the call becomes when its backend is chosen while tracing: the output comes first among several results.
_CHOSEN = frozenset(
    {
        aten._scaled_dot_product_flash_attention_for_cpu.default, aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_attention_math.default,
    }
)  # fmt: skip


class SdpaRule:
    """Every call of torch's scaled_dot_product_attention."""

    name = "sdpa"
    anchors = frozenset({aten.scaled_dot_product_attention.default, *_CHOSEN})

    def read(self, anchor: Node, shadow: Shadow) -> Site:
        """The site of one call. Raises Reject."""
        held = arguments(anchor)
        call: dict[str, Any] = {**_DEFAULTS, **{name: held[name] for name in _NAMES if name in held}}
        root = anchor
        if anchor.target in _CHOSEN:
            call |= {"attn_mask": held.get("attn_mask", held.get("attn_bias")), "enable_gqa": True}
            root = _output(anchor, call, shadow)
        if not 0 <= call["dropout_p"] < 1:
            raise Reject(f"dropout {call['dropout_p']:g} on the attention weights leaves nothing", anchor)
        space = Space()
        q, k, v, weights, out = _label(space, call, root)
        key = weights[-1]
        scores = _scores(call, weights, q[-1], anchor)
        parts = Parts(
            (call["query"], q), (call["key"], k), (call["value"], v), scores, root.meta["val"].dtype
        )
        given = Causal(TOP_LEFT) if call["is_causal"] else FULL
        change = Change(dropout=float(call["dropout_p"]))
        frame = Frame(self.name, root, out, weights, key, frozenset({anchor} - {root}), given, change)
        return build(space, shadow, parts, frame, safe=True)


def _output(anchor: Node, call: dict[str, Any], shadow: Shadow) -> Node:
    """The output among the results of a call whose backend was chosen."""
    users = shadow.users(anchor)
    if len(users) != 1 or users[0].target is not getitem or users[0].args[1] != 0:
        raise Reject("something else than the output of the call is used too", anchor, 1)
    lengths = (shape_of(call[name])[-2] for name in ("query", "key"))
    if call["is_causal"] and not same(*lengths):
        raise Reject("how the backend aligns a causal mask of unequal lengths is not known", anchor, 1)
    return users[0]


def _label(space: Space, call: dict[str, Any], node: Node) -> tuple[Dims, Dims, Dims, Dims, Dims]:
    """Labels of q, k, v, the weights and the output."""
    q, k, v = (shape_of(call[name]) for name in _NAMES[:3])
    batch: Dims = tuple(space.fresh(size) for size in shape_of(node)[:-2])
    kv_batch = batch
    if call["enable_gqa"] and batch and not same(k[-3], q[-3]):
        share, kv = _share(space, batch[-1], k[-3], node)
        batch, kv_batch = (*batch[:-1], kv + share), (*batch[:-1], kv)
    i, j, d, dv = space.fresh(q[-2]), space.fresh(k[-2]), space.fresh(q[-1]), space.fresh(v[-1])
    return (
        _fitted(space, broadcast_up((*batch, i, d), q), q, node),
        _fitted(space, broadcast_up((*kv_batch, j, d), k), k, node),
        _fitted(space, broadcast_up((*kv_batch, j, dv), v), v, node),
        (*batch, i, j),
        (*batch, i, dv),
    )


def _fitted(space: Space, dims: Dims, shape: tuple[Size, ...], node: Node) -> Dims:
    """`dims`, unless their sizes differ for certain: the library does not check that there is a value for each key."""
    for axes, size in zip(dims, shape, strict=True):
        wanted = product(a.size for a in space.leaves(axes))
        if isinstance(wanted, int) and isinstance(size, int) and wanted != size:
            raise Reject("queries, keys and values do not fit together", node)
    return dims


def _share(space: Space, heads: Axes, kv_heads: Any, node: Node) -> tuple[Axes, Axes]:
    if not isinstance(kv_heads, int) or not isinstance(heads[0].size, int) or heads[0].size % kv_heads:
        raise Reject("grouped heads whose number is not known", node)
    if is_one(kv_heads):
        return heads, ()
    major, minor = space.split(heads[0], (kv_heads, heads[0].size // kv_heads))
    return (minor,), (major,)


def _scores(call: dict[str, Any], weights: Dims, d: Axes, node: Node) -> Scores:
    mask, scale = call["attn_mask"], call["scale"]
    rsqrt: Axes = ()
    if scale is None:
        size = shape_of(call["query"])[-1]
        scale, rsqrt = (size**-0.5, ()) if isinstance(size, int) else (1.0, d)
    if not isinstance(scale, int | float):
        raise Reject("the scale depends on sizes", node)
    plain = Scores(scale=float(scale), rsqrt=rsqrt)
    if mask is None:
        return plain
    dims = broadcast_up(weights, shape_of(mask))
    if mask.meta["val"].dtype == torch.bool:
        return replace(plain, fills=(Fill(mask, dims, -torch.inf, hides=False),))
    return replace(plain, terms=(Term(mask, dims),))


RULE = SdpaRule()
