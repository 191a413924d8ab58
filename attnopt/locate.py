"""Where in the user's code a node comes from, and whether it stands where attention would stand."""

import re
from collections import deque
from pathlib import Path
from typing import TypedDict

import torch
from torch.fx import Node

from attnopt.passes.contraction import contraction
from attnopt.shadow import Shadow

_TORCH = str(Path(torch.__file__).parent)
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>.+)\n\s*(?P<code>.*)')
_WHOLE = frozenset(
    {
        torch.ops.aten.scaled_dot_product_attention.default,
        torch.ops.aten._transformer_encoder_layer_fwd.default,
        torch.ops.aten._native_multi_head_attention.default,
    }
)
#: How many nodes above and below a softmax are searched for products.
REACH = 40


class Where(TypedDict):
    """The fields of a SiteReport that say where it is."""

    where: str
    module: str
    code: str


def where(node: Node, fallback: Node | None = None) -> Where:
    """File, line, module path and source line of a node; of `fallback` when the node has no trace."""
    for candidate in (node, fallback):
        frames = (
            list(_FRAME.finditer(candidate.meta.get("stack_trace") or "")) if candidate is not None else []
        )
        if frames and candidate is not None:
            # The user's own line, also where torch itself makes the call.
            frame = next((f for f in reversed(frames) if not f["file"].startswith(_TORCH)), frames[-1])
            name = f"{Path(frame['file']).name}:{frame['line']}"
            return Where(where=name, module=_module(candidate), code=frame["code"].strip())
    return Where(where="?", module=_module(node), code="")


def _module(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    if not entries:
        return ""
    path = str(entries[-1][0])
    inside = re.match(r"^[LG]\['(?P<root>\w+)'\]\.?", path)
    if inside is not None:
        path = (
            path[inside.end() :]
            if inside["root"] == "self"
            else f"{inside['root']}.{path[inside.end() :]}".rstrip(".")
        )
    return re.sub(r"_modules\['([^']+)'\]|\['([^']+)'\]", lambda m: m[1] or m[2], path)


def is_attention_shaped(shadow: Shadow, anchor: Node) -> bool:
    """Whether two products of computed tensors stand around the anchor, as in attention, or it is both in one."""
    if anchor.target in _WHOLE:
        return True
    return _meets_product(anchor, lambda n: n.all_input_nodes) and _meets_product(anchor, shadow.users)


def _meets_product(start: Node, step: object) -> bool:
    pending, seen = deque([start]), {start}
    while pending and len(seen) < REACH:
        for node in step(pending.popleft()):  # type: ignore[operator]
            form = contraction(node)
            if form is not None and not any(_is_weight(side) for side in (form.lhs, form.rhs)):
                return True
            if node not in seen and node.target is not torch.ops.aten.linear.default:
                seen.add(node)
                pending.append(node)
    return False


def _is_weight(node: Node) -> bool:
    """A tensor that is an input as it stands, or a view of one, is a weight rather than an activation."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1 and node.meta["val"].dim() <= 2:
        node = node.all_input_nodes[0]
    return node.op in ("placeholder", "get_attr") and node.meta["val"].dim() <= 2
