"""Steps that bound the scores from below: hidden ones alone may notice."""

from dataclasses import replace
from math import inf
from typing import Any

import torch
from torch.fx import Node

from attnopt.passes.constants import present
from attnopt.passes.layout import Dims
from attnopt.passes.mask_writes import arguments
from attnopt.passes.scores_moves import Move, is_tensor, need_uncapped, need_unscaled, settled, up
from attnopt.passes.terms import NEGLIGIBLE, Floor, Scores
from attnopt.rule import Reject


def maximum(node: Node, dims: Dims, here: Scores) -> list[Move]:
    """The larger of scores and a number."""
    left, right = node.args[:2]
    for scores, bound in ((left, right), (right, left)):
        if is_tensor(scores) and present(bound) is not None:
            return [_raised(node, dims, here, scores, present(bound), halves=True)]
    raise Reject("the larger of two tensors is taken as scores", node, len(here.path))


def clamp(node: Node, dims: Dims, here: Scores) -> list[Move]:
    """Scores that are at least a number."""
    call = arguments(node)
    if call.get("max") is not None and present(call["max"]) != inf:
        raise Reject(
            "scores are clamped from above, which no kernel does; clamp the queries or keys instead",
            node,
            len(here.path),
        )
    return [
        _raised(node, dims, here, call["self"], present(call["min"]) if call["min"] is not None else -inf)
    ]


def _raised(
    node: Node, dims: Dims, here: Scores, scores: Any, bound: float | None, *, halves: bool = False
) -> Move:
    """max(scores, bound), where only hidden scores lie below the bound."""
    if not node.meta["val"].dtype.is_floating_point:
        raise Reject("whole numbers are raised to a least one, which no scores are", node, len(here.path))
    here, lowest = settled(here), torch.finfo(node.meta["val"].dtype).min
    if bound is None or not bound * here.scale <= max(NEGLIGIBLE, lowest):
        shown = "a tensor" if bound is None else f"{bound:g}"
        raise Reject(
            f"scores are raised to at least {shown}, which visible keys may notice", node, len(here.path)
        )
    if bound == -inf:
        return up(scores, dims, here)
    need_uncapped(here, node, "a lower bound")
    need_unscaled(here, node, "a lower bound")
    return up(scores, dims, replace(here, casts=(*here.casts, Floor(bound, here.scale, halves))))


def nan_to_num(node: Node, dims: Dims, here: Scores) -> list[Move]:
    """-inf becomes a finite number, as by a lower bound. Scores that are NaN or inf stay so: q or k holds such."""
    call = arguments(node)
    lowest = torch.finfo(node.meta["val"].dtype).min
    bound = lowest if call["neginf"] is None else present(call["neginf"])
    return [_raised(node, dims, here, call["self"], bound)]
