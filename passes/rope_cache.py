"""Where a step's own key lies among the keys that it meets: behind those of a cache, or written into a static one."""

from dataclasses import replace
from typing import Any

from torch.fx import Node

from attnopt.passes import emit
from attnopt.passes.layout import Dims, Space, step_up
from attnopt.passes.mask_writes import arguments, operation
from attnopt.passes.rope_trial import bare
from attnopt.passes.site import Operand
from attnopt.passes.sizes import is_one, product, same, shape_of
from attnopt.rule import Reject, Site


def is_appended(site: Site) -> bool:
    """Whether the keys are a cache and one key behind it, the query's own: all others lie before it."""
    node, dims = _uncovered(site, "k")
    roles = emit.result_of(site).roles
    if roles.key not in dims or operation(node) not in {"cat", "concat"}:
        return False
    held = arguments(node)
    dim, pieces = int(held.get("dim", 0)) % len(dims), list(held["tensors"])
    own = shape_of(pieces[-1])
    return dims.index(roles.key) == dim and len(own) == len(dims) and is_one(own[dim])


def is_written(site: Site) -> bool:
    """Whether the graph writes the queries' own keys into a cache that is longer (transformers' StaticCache)."""
    return _own(site, "k") is not None


def with_own_keys(site: Site) -> Site:
    """The site over the keys and values that the graph makes itself, if it writes them into a static cache."""
    k, v = _own(site, "k"), _own(site, "v")
    if k is None or v is None:
        return site
    result = emit.result_of(site)
    made = replace(result, roles=replace(result.roles, key=result.roles.query))
    return replace(site, operands={**site.operands, "k": k, "v": v}, result=made)


def _own(site: Site, name: str) -> Operand | None:
    """The keys, or values, that are written, as many as there are queries; None where there is no such write."""
    node, dims = _uncovered(site, name)
    roles, operand = emit.result_of(site).roles, site.operands[name]
    if roles.key not in dims or (isinstance(operand, Operand) and operand.beside):
        return None
    node = _whole(node, dims.index(roles.key))
    written = _rows_written(node, dims.index(roles.key))
    if written is None:
        return None
    asked = product(a.size for a in roles.query)
    wanted = [asked if axes == roles.key else size for axes, size in zip(dims, shape_of(node), strict=True)]
    shape = shape_of(written)
    if len(shape) != len(wanted) or not all(map(same, shape, wanted)):
        return None
    return Operand(written, tuple(roles.query if axes == roles.key else axes for axes in dims))


def _whole(node: Node, dim: int) -> Node:
    """What the first rows along `dim` are taken of."""
    held = arguments(node)
    if operation(node) != "slice" or int(held["dim"]) % len(shape_of(node)) != dim or held["step"] != 1:
        return node
    return held["self"] if held["start"] in (None, 0) else node


def _rows_written(node: Node, dim: int) -> Node | None:
    """What a node writes at rows, along `dim`, that numbers choose."""
    held, value = arguments(node), None
    if operation(node) == "index_copy" and int(held["dim"]) % len(shape_of(node)) == dim:
        value = held["source"]
    if operation(node) == "index_put" and not held["accumulate"] and _chooses(held["indices"], dim):
        value = held["values"]
    return value if isinstance(value, Node) else None


def _chooses(indices: Any, dim: int) -> bool:
    """Whether there is one index, into that dimension."""
    return [place for place, index in enumerate(indices) if index is not None] == [dim]


def _uncovered(site: Site, name: str) -> tuple[Node, Dims]:
    """What lies above views of all elements of the keys, or values, with its dimensions."""
    try:
        whole = bare(site.operands[name])
    except Reject:
        return site.root, ()
    node, dims, space = whole.node, whole.dims, Space()
    while True:
        above = node.all_input_nodes[:1]
        is_whole = operation(node) == "slice" and all(map(same, shape_of(node), shape_of(above[0])))
        moved = (above[0], dims) if is_whole else step_up(space, node, dims)
        if moved is None:
            return node, dims
        node, dims = moved
