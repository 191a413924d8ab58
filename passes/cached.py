"""Where the keys and values of a decoding site come from: a cache of SparQ's, one copied each step, or elsewhere.

`attnopt::sparq_append` writes each new token into the keys by rows, the keys by channels, the values and their mean. A
site that reads the buffers behind it may therefore read the other two of that call as well: that they are in step is
what the operator promises.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch._ops import OpOverload
from torch.fx import Node

from attnopt.passes import emit
from attnopt.passes.mask_writes import arguments, sharing, targets
from attnopt.passes.site import Operand, Roles
from attnopt.rule import Site

aten = torch.ops.aten

#: The name of the operator; the passes know no kernel, and need none to recognise the call.
APPEND = "attnopt::sparq_append"
#: Operators whose result is a copy of the whole cache with the new token behind it.
GROWING = (aten.cat.default, aten.concat.default, aten.concatenate.default)

#: "appended": by SparQ's operator. "copied": the graph concatenates old and new keys. "given": anything else.
Origin = Literal["appended", "copied", "given"]


@dataclass(frozen=True, slots=True)
class Held:
    """How the keys of a site are held, and the further operands that are in step with them."""

    origin: Origin
    beside: Mapping[str, Operand]


def held(site: Site) -> Held:
    """What is known of the cache that a site reads; `beside` is empty unless it is surely SparQ's."""
    k, v = site.operands["k"], site.operands["v"]
    if not isinstance(k, Operand) or not isinstance(v, Operand):
        return Held("given", {})
    if k.node.target in GROWING:
        return Held("copied", {})
    append = _append_of(site, k.node, v.node)
    roles = emit.result_of(site).roles
    if append is None or not _is_plain(k, roles, roles.d) or not _is_plain(v, roles, roles.dv):
        return Held("given", {})
    return Held("appended", dict(_beside(arguments(append), k, v, roles)))


def _beside(
    given: Mapping[str, object], k: Operand, v: Operand, roles: Roles
) -> Iterator[tuple[str, Operand]]:
    (batch, heads, positions, channels), (*_, wide) = k.dims, v.dims
    by_channel, mean = given["k_t"], given["v_mean"]
    if isinstance(by_channel, Node):
        layout = (roles.batch, roles.kv_heads, roles.d, roles.key)
        dims = (batch, heads, channels, positions)
        yield "k_t", replace(k, node=by_channel, dims=dims, layout=layout)
    if isinstance(mean, Node):
        yield "v_mean", Operand(mean, (*v.dims[:2], wide), layout=(roles.batch, roles.kv_heads, roles.dv))


def _is_plain(operand: Operand, roles: Roles, width: object) -> bool:
    """Whether it is the buffer itself, (B, Hkv, S, width), unscaled and whole."""
    alone = operand == Operand(operand.node, operand.dims, dtype=operand.dtype)
    if not alone or len(operand.dims) != 4 or operand.dtype not in (None, operand.node.meta["val"].dtype):
        return False
    batch, heads, positions, channels = operand.dims
    return (*batch, *heads) == (*roles.batch, *roles.kv_heads) and (positions, channels) == (roles.key, width)


def _append_of(site: Site, k: Node, v: Node) -> Node | None:
    """The append before the site that wrote these buffers; None if anything else writes to one of its four."""
    appends = [
        user for user in k.users if _is_append(user) and arguments(user)["k"] is k and user < site.root
    ]
    if not appends or arguments(appends[-1])["v"] is not v:
        return None
    given = arguments(appends[-1])
    buffers = [x for x in (given["k"], given["v"], given["k_t"], given["v_mean"]) if isinstance(x, Node)]
    found = {writer for buffer in buffers for writer in writers(buffer)}
    own = all(_is_append(w) and _buffers(w) == _buffers(appends[-1]) and w < site.root for w in found)
    return appends[-1] if own else None


def writers(buffer: Node) -> Iterator[Node]:
    """What writes to the memory of `buffer`; tensors that one call writes to count as shared."""
    for alias in sharing(buffer):
        yield from (user for user in alias.users if alias in targets(user))


def _is_append(node: Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.name == APPEND


def _buffers(append: Node) -> tuple[object, ...]:
    given = arguments(append)
    return given["k"], given["v"], given["k_t"], given["v_mean"]
