"""Scores of which a block is written to in place: scores[:, :, 1:, 1:] += bias leaves out the class token.

Multiscale vision transformers (arXiv 2112.01526) add their relative positions so. What is added to the block is read
as a bias of the block, around which nothing is added.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import sympy
from torch.fx import Node

from attnopt.passes.layout import Axis, Dims, Space
from attnopt.passes.logits_bias import bias_of, hiding_number
from attnopt.passes.mask_writes import Place, arguments, block_of, covered, operation, written_by
from attnopt.passes.scores_factors import numbers_written
from attnopt.passes.scores_moves import settled
from attnopt.passes.site import Roles
from attnopt.passes.site_block import Block
from attnopt.passes.sizes import shape_of
from attnopt.passes.terms import Blocked, Scores, Term
from attnopt.rule import Reject

#: Reads a value with these labels up to the base, of which it is to be a sum with other tensors.
Read = Callable[[Node, Dims, Scores], Scores]


@dataclass(frozen=True, slots=True)
class Base:
    """Where reading what is written to a block ends: at `places` of `node`, read after the writes in `before`."""

    node: Node
    places: tuple[Place, ...]
    before: tuple[Node, ...]

    def ends_at(self, node: Node, reader: Node | None) -> bool:
        """Whether `node` is the block as it was before; Reject where it was read earlier than that."""
        if not _chain_up(node, self.node) or block_of(node, self.node) != self.places:
            return False
        if reader is None or any(reader < write for write in self.before):
            raise Reject(
                f"a block of {self.node.name} is written to between its reading and its writing", node
            )
        return True


def written(
    node: Node, dims: Dims, below: Scores, writes: Sequence[Node], read: Callable[[Base], Read]
) -> Scores:
    """What is known of the scores below `node`, and what the `writes` to it have added; Reject if they did more."""
    here = settled(below)
    if here.factors or here.rsqrt or here.softcap is not None:
        raise refused_write(node, writes[-1], below)
    left = list(writes)
    while left:
        last = left[-1]
        places = covered(last, node)
        if places is None:
            raise refused_write(node, last, below)
        inner = _block(node, dims, places, below)
        value, seed = _value(last, below)
        # The statement `a[i] += b` writes to the block, and stores it back to itself.
        left, earlier = [write for write in left if write not in (last, value)], left
        base = Base(node, places, tuple(left))
        found = read(base)(value, inner, seed)
        used = {*found.path, last}
        if any(write not in used for write in earlier if write not in left) or not _is_sum(found):
            raise refused_write(node, last, below)
        made = tuple(_blocked(node, term, dims, inner, places, here) for term in found.terms)
        chain = (*_chain(last, node), *(n for part in found.path for n in _chain_up(part, node)))
        here = replace(here, blocks=(*here.blocks, *made), path=(*here.path, last, *found.path, *chain))
    return replace(here, path=(*here.path, node))


def refused_write(node: Node, write: Node, below: Scores) -> Reject:
    """The refusal of a write that is no sum in a block."""
    return Reject(
        f"an inner value of the attention ({node.name}) is written to in place, perhaps through a view",
        write,
        len(below.path) + 1,
    )


def _value(write: Node, below: Scores) -> tuple[Node, Scores]:
    """What stands in the block after a write, and where it is read from."""
    reader = below.path[-1:]
    if operation(write) != "copy":
        return write, Scores(path=reader)
    source, target = arguments(write)["src"], written_by(write)
    same = target is not None and source.meta["val"].dtype == target.meta["val"].dtype
    if not same or len(shape_of(source)) != len(shape_of(write)) or shape_of(source) != shape_of(write):
        raise Reject(
            "a block of the scores is overwritten by another shape or type", write, len(below.path) + 1
        )
    return source, Scores(path=(write,))


def _block(node: Node, dims: Dims, places: Sequence[Place], below: Scores) -> Dims:
    """The labels of a block: those of the whole dimension, or a new axis for a part of it."""
    sizes = shape_of(node)
    if any(place.is_single for place in places):
        raise Reject("a single row or column of the scores is written to in place", node, len(below.path) + 1)
    whole = [sympy.expand(p.length - sympy.sympify(n)) == 0 for p, n in zip(places, sizes, strict=True)]
    return tuple(
        axes if is_whole else (Axis(int(p.length) if p.length.is_number else p.length),)
        for axes, p, is_whole in zip(dims, places, whole, strict=True)
    )


def _is_sum(found: Scores) -> bool:
    plain = not (found.fills or found.factors or found.casts or found.blocks or found.rsqrt)
    return plain and found.form is None and found.scale == 1.0 and found.shift == 0 and found.softcap is None


def _chain(write: Node, base: Node) -> tuple[Node, ...]:
    """The views between a tensor and the target of a write."""
    target = written_by(write)
    return () if target is None else _chain_up(target, base)


def _chain_up(node: Node, base: Node) -> tuple[Node, ...]:
    """The slices by which `node` is a block of `base`; () if it is none."""
    found: list[Node] = []
    here: object = node
    while isinstance(here, Node) and here is not base and operation(here) in ("slice", "alias", "detach"):
        found.append(here)
        here = here.args[0]
    return tuple(found) if here is base else ()


def _blocked(
    node: Node, term: Term, outer: Dims, inner: Dims, places: Sequence[Place], here: Scores
) -> Blocked:
    large = hiding_number(term) != -float("inf") or any(
        abs(n) == float("inf") for n in numbers_written(term.node)
    )
    if large or term.times or not term.node.meta["val"].dtype.is_floating_point:
        raise Reject(
            "a mask, or a product, is written into a block of the scores; add a bias of all queries and keys",
            term.node,
            len(here.path),
        )
    pads: list[tuple[int, int]] = []
    for place, size in zip(places, shape_of(node), strict=True):
        after = sympy.expand(sympy.sympify(size) - place.start - place.length)
        if not (place.start.is_number and after.is_number):
            raise Reject("what of the scores is written to depends on sizes", term.node, len(here.path))
        pads.append((int(place.start), int(after)))
    made = replace(term, factor=term.factor * here.scale, casts=here.casts)
    return Blocked(made, outer, inner, tuple(pads))


def block_biases(space: Space, roles: Roles, scores: Scores) -> tuple[Block, ...]:
    """Each as an operand: queries and keys of the block, with nothing added outside. Reject for blocks of others."""
    known = {a for blocked in scores.blocks for axes in space.resolve(blocked.term.dims) for a in axes}
    return tuple(_operand(space, roles, blocked, known) for blocked in scores.blocks)


def _operand(space: Space, roles: Roles, blocked: Blocked, known: set[Axis]) -> Block:
    bias, node = bias_of(space, roles, blocked.term), blocked.term.node
    groups = {roles.query: (roles.query, (0, 0)), roles.key: (roles.key, (0, 0))}
    for outer, inner, pads in zip(blocked.outer, blocked.inner, blocked.pads, strict=True):
        axes = space.leaves(outer)
        if pads != (0, 0) and (not axes or axes not in groups):
            raise Reject("a block of the scores that is no block of queries and keys is written to", node, 9)
        if pads != (0, 0):
            groups[axes] = space.leaves(inner), pads
    (rows, row_pads), (columns, column_pads) = groups[roles.query], groups[roles.key]
    held = {a for axes in bias.dims for a in axes}
    if not {*rows, *columns} <= known:
        raise Reject(
            "what is added to a block of the scores is the same for all queries, or for all keys", node, 9
        )
    outside = [group if held & {*group} else () for group in (roles.batch, roles.heads)]
    return Block(
        bias.node, bias.dims, bias.factor, bias.times, dtype=bias.dtype,
        layout=(outside[0], outside[1], rows, columns), pads=(row_pads, column_pads),
    )  # fmt: skip
