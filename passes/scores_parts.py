"""Scores that are summed over their parts, laid side by side: cat((a, b), 1).view(B, 2, H, Sq, Sk).sum(1) is a + b.

Axial attention adds its position terms so (https://github.com/csrhuddle/axial-deeplab).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from attnopt.passes.layout import Axes, Axis, Dims, Space, input_node, step_up
from attnopt.passes.mask_writes import arguments, writes_after
from attnopt.passes.scores_moves import Move, settled
from attnopt.passes.scores_steps import added_term
from attnopt.passes.sizes import product, same, shape_of
from attnopt.passes.terms import Scores
from attnopt.rule import Reject

aten = torch.ops.aten

#: More parts than this are no position terms of scores.
MOST_PARTS = 4


@dataclass(frozen=True, slots=True)
class Parts:
    """parts: tensors with the labels `dims`, one for each place along the summed axis. path: from the sum to `node`."""

    node: Node
    parts: tuple[Node, ...]
    dims: Dims
    path: tuple[Node, ...]


def part_moves(space: Space, node: Node, dims: Dims, here: Scores) -> list[Move]:
    """Where the scores may come from above a sum over parts: any of them, the others are added. [] for no such sum."""
    found = _parts(space, node, dims, here) if node.target == aten.sum.dim_IntList else None
    if found is None:
        return []
    below = settled(replace(here, path=(*here.path, *found.path)))
    moves: list[Move] = []
    for part in range(len(found.parts)):
        others = [x for n, x in enumerate(found.parts) if n != part]
        terms = tuple(added_term(found.node, x, found.dims, below, 1.0) for x in others)
        moves.append((found.parts[part], found.dims, replace(below, terms=(*below.terms, *terms))))
    return moves


def _parts(space: Space, node: Node, dims: Dims, here: Scores) -> Parts | None:
    """What a sum over one dimension adds; None where that dimension does not count tensors laid side by side."""
    call = arguments(node)
    source = input_node(node)
    over = [int(d) % len(shape_of(source)) for d in call["dim"] or ()]
    if len(over) != 1 or source.meta["val"].dtype != node.meta["val"].dtype:
        return None
    at = over[0]
    axis = Axis(shape_of(source)[at])
    rest = (*dims[:at], *dims[at + 1 :]) if call["keepdim"] else dims
    return _gathered(space, node, (source, (*rest[:at], (axis,), *rest[at:])), axis, here)


def _gathered(space: Space, reader: Node, start: tuple[Node, Dims], axis: Axis, here: Scores) -> Parts | None:
    """Up through views to the cat or the stack along `axis`."""
    node, dims = start
    path: list[Node] = []
    while node.op == "call_function":
        if writes_after(node, reader):
            return None
        path.append(node)
        if node.target in (aten.cat.default, aten.stack.default):
            return _beside(space, node, dims, axis, tuple(path))
        try:
            moved = step_up(space, node, dims)
        except Reject as reject:
            raise Reject(reject.reason, reject.node, len(here.path) + len(path)) from None
        if moved is None:
            return None
        reader, (node, dims) = node, moved
    return None


def _beside(space: Space, node: Node, dims: Dims, axis: Axis, path: tuple[Node, ...]) -> Parts | None:
    """The parts, if each is one place along `axis`: for a cat, its major axis, with the whole rest in each part."""
    call = arguments(node)
    parts: Sequence[Any] = call["tensors"]
    at = int(call["dim"]) % len(dims)
    axes = space.leaves(dims[at])
    plain = axes[:1] == (axis,) and same(axis.size, len(parts)) and len(parts) <= MOST_PARTS
    if not plain or any(part.meta["val"].dtype != node.meta["val"].dtype for part in parts):
        return None
    rest = axes[1:]
    if node.target == aten.stack.default:
        return None if rest else Parts(node, tuple(parts), (*dims[:at], *dims[at + 1 :]), path)
    if any(not _is_whole(part, at, len(dims), rest) for part in parts):
        return None
    return Parts(node, tuple(parts), (*dims[:at], rest, *dims[at + 1 :]), path)


def _is_whole(part: Node, at: int, rank: int, rest: Axes) -> bool:
    shape = shape_of(part)
    return len(shape) == rank and same(shape[at], product(a.size for a in rest))
