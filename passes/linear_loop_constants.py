"""Constants of a loop in the graph's own types: trials run in fp64, which rounds neither positions nor decays.

Positions in bf16 end at 256, where a running sum of ones stops growing; what is decided by them is another mask then.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from attnopt.passes.linear_loop_alike import Shapes
from attnopt.passes.linear_loop_probe import Draw, sizes_of, symbols_of
from attnopt.passes.mask_numbers import WIDE
from attnopt.passes.replay import evaluate, resized
from attnopt.passes.reroll_cut import Region
from attnopt.passes.reroll_sizes import name_of
from attnopt.passes.sizes import Concrete
from attnopt.rule import Reject

#: What hands out memory that nobody has written to yet.
_UNWRITTEN = frozenset({"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"})


def check_constants(region: Region, shapes: Shapes) -> None:
    """Raises Reject where the graph rounds what its masks and decays are made of, and the trials do not.

    Where a length is symbolic, it must not be rounded at any: positions in a half type are, from some length on.
    shapes: of tensors that need fewer elements than they have.
    """
    constant = tuple(_constant(region))
    sizes = sizes_of(region, Draw(0))
    numbers = {node: sizes.number(node.meta["val"]) for node in region.numbers}
    wanted = {node: [sizes.of(size) for size in shape] for node, shape in shapes.items()}
    wide = evaluate(constant, numbers, sizes, wanted)
    held = _as_held(constant, numbers, sizes, wanted)
    for node in constant:
        if not isinstance(held[node], Tensor):
            continue
        if not _agree(held[node], wide[node]) or (symbols_of(region) and not _lasts(node, wide)):
            dtype = node.meta["val"].dtype
            raise Reject(
                f"a mask or decay of a loop over positions is rounded by its type ({node.name}, {dtype}); "
                "count positions in torch.int64 or torch.float32", node, 2,
            )  # fmt: skip


def _constant(region: Region) -> Iterator[Node]:
    """The nodes that follow from sizes alone."""
    known = {*region.numbers}
    for node in region.nodes:
        follows = node.op == "call_function" and known.issuperset(node.all_input_nodes)
        if follows and node not in region.leaves and name_of(node) not in _UNWRITTEN:
            known.add(node)
            yield node


def _as_held(
    nodes: tuple[Node, ...],
    numbers: Mapping[Node, float],
    sizes: Concrete,
    shapes: Mapping[Node, Sequence[int]],
) -> dict[Node, Any]:
    """Their values in the graph's own types."""
    known: dict[Node, Any] = dict(numbers)
    for node in nodes:
        args, kwargs = pytree.tree_map(lambda x: _argument(x, known, sizes), (node.args, dict(node.kwargs)))
        args = resized(node, args, shapes[node]) if node in shapes else args
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known


def _argument(value: Any, known: dict[Node, Any], sizes: Concrete) -> Any:
    match value:
        case Node():
            return known[value]
        case torch.SymInt() | torch.SymFloat():
            return sizes.number(value)
        case torch.device():
            return torch.device("cpu")
    return value


def _agree(held: Tensor, wide: Tensor) -> bool:
    """Whether two values differ by no more than rounding: not at all where they are whole."""
    if not held.is_floating_point():
        return torch.equal(held, wide)
    far = (held.double() - wide).abs().nan_to_num(0.0)
    return bool((far <= wide.abs() * torch.finfo(held.dtype).eps ** 0.5).all())


def _lasts(node: Node, wide: dict[Node, Any]) -> bool:
    """Whether the value is as exact at any length: numbers that decide must be whole, and of a wide type."""
    made, given = node.meta["val"], [n for n in node.all_input_nodes if isinstance(wide.get(n), Tensor)]
    if made.dtype != torch.bool:
        return True
    floats = [n for n in given if n.meta["val"].is_floating_point() and n.meta["val"].dim()]
    return all(_is_binary(wide[n]) or (_is_whole(wide[n]) and n.meta["val"].dtype in WIDE) for n in floats)


def _is_whole(value: Tensor) -> bool:
    return bool((value == value.round()).all())


def _is_binary(value: Tensor) -> bool:
    """Whether it is a mask already, whatever its length."""
    return bool(((value == 0) | (value == 1)).all())
