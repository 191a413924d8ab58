"""Runs the part of a shadow between a site's operands and its root, in fp64, at its own or at smaller sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from attnopt.passes import emit
from attnopt.passes.mask_writes import writes_after
from attnopt.passes.sizes import Concrete
from attnopt.rule import Site
from attnopt.shadow import CONSTANT, Shadow

aten = torch.ops.aten

#: Operations whose integer arguments are sizes or positions along a dimension.
_SHAPED = frozenset(
    str(packet)
    for packet in (
        aten.view, aten.reshape, aten._unsafe_view, aten.expand, aten.broadcast_to, aten.arange, aten.full, aten.zeros,
        aten.ones, aten.new_ones, aten.new_zeros, aten.new_full, aten.empty, aten.unflatten, aten.narrow, aten.slice,
        aten.split, aten.split_with_sizes, aten._reshape_alias, aten.linspace, aten.repeat, aten.new_empty,
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Replay:
    """nodes: what has to run, in order, writes in place included; leaves: where it starts; root: where it ends."""

    nodes: tuple[Node, ...]
    leaves: tuple[Node, ...]
    root: Node

    @classmethod
    def of(cls, shadow: Shadow, site: Site) -> "Replay":
        """The slice of one site."""
        leaves = tuple(emit.leaves(site))
        seen: set[Node] = set()
        pending = [site.root]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            pending.extend(writes_after(node, site.root))
            if node not in leaves:
                pending.extend(node.all_input_nodes)
        needed = seen - {*leaves}
        return cls(tuple(sorted(needed, key=lambda n: shadow.order[n])), leaves, site.root)

    def run(self, values: Mapping[Node, Any], sizes: Concrete) -> Tensor:
        """The root's value. values: of the leaves; sizes: numbers for the graph's sizes."""
        known: dict[Node, Any] = {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}
        free = torch.Generator().manual_seed(1)
        for node in self.nodes:
            known[node] = _wide(_run(node, known, sizes, free))
        result: Tensor = known[self.root]
        return result

    @property
    def numbers(self) -> frozenset[int]:
        """Whole numbers that the slice writes down and that are no sizes of its tensors: offsets, widths, positions."""
        held = [n.meta.get("val") for n in (*self.nodes, *self.leaves)]
        sizes = {
            size for value in held if isinstance(value, Tensor) for size in value.shape if type(size) is int
        }
        written = pytree.tree_leaves([(n.args, dict(n.kwargs)) for n in self.nodes])
        return frozenset(abs(x) for x in written if type(x) is int and x not in sizes)


def _run(node: Node, known: Mapping[Node, Any], sizes: Concrete, free: torch.Generator) -> Any:
    if node.op == "placeholder":
        return _input(node, sizes, free)
    if node.op == "get_attr":
        held = getattr(node.graph.owning_module, str(node.target))
        return held.detach().cpu() if isinstance(held, Tensor) else held
    shaped = _packet(node) in _SHAPED
    kept = sizes if shaped else Concrete()
    args, kwargs = pytree.tree_map(lambda x: _argument(x, known, kept), (node.args, node.kwargs))
    if _makes_floats(node):
        args = pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) else x, args)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _makes_floats(node: Node) -> bool:
    """Whether integers become floating point here, as in arange(n) / 2: by themselves they would become single ones."""
    made = node.meta.get("val")
    given = [n.meta.get("val") for n in node.all_input_nodes]
    tensors = [value for value in given if isinstance(value, Tensor)]
    is_float = isinstance(made, Tensor) and made.is_floating_point()
    return (
        is_float
        and bool(tensors)
        and not any(t.is_floating_point() or t.dtype == torch.bool for t in tensors)
    )


def _packet(node: Node) -> str:
    return str(getattr(node.target, "overloadpacket", node.target))


def _argument(value: Any, known: Mapping[Node, Any], sizes: Concrete) -> Any:
    match value:
        case Node():
            return known[value]
        case bool():
            return value
        case int():
            return sizes.of(value)
        case torch.device():
            return torch.device("cpu")
        case torch.dtype():
            return torch.float64 if value.is_floating_point else value
    return value


def _wide(value: Any) -> Any:
    """Floating tensors in fp64; a number held in a 0-d tensor stays as rounded as the graph holds it."""
    return (
        value.double() if isinstance(value, Tensor) and value.is_floating_point() and value.dim() else value
    )


def _input(node: Node, sizes: Concrete, free: torch.Generator) -> Any:
    """An input that no operand stands for, such as a length, or data under a mask that was proven to ignore it."""
    value = node.meta.get(CONSTANT, node.meta["val"])
    if CONSTANT in node.meta:
        return value.detach().cpu().clone()
    if isinstance(value, torch.SymInt):
        return sizes.of(value)
    if not isinstance(value, Tensor):
        return value
    shape = [sizes.of(s) for s in value.shape]
    if value.is_floating_point():
        return torch.randn(shape, generator=free, dtype=torch.float64)
    return torch.randint(0, 2, shape, generator=free).to(value.dtype)


def normal_form(replay: Replay, site: Site) -> str:
    """The slice, its operands and the spec as text; equal for equal sites, whatever their place in the graph."""
    number = {node: n for n, node in enumerate((*replay.leaves, *replay.nodes))}
    lines = [
        f"{number[n]}: {n.target if n.op == 'call_function' else n.op} {_shown(n, number)}"
        for n in replay.nodes
    ]
    held = [f"{number[n]}: {_meta(n)}" for n in replay.leaves]
    return "\n".join([str(site.spec), *held, *lines])


def _shown(node: Node, number: Mapping[Node, int]) -> str:
    shown = pytree.tree_map(
        lambda x: f"%{number[x]}" if isinstance(x, Node) else x, (node.args, dict(node.kwargs))
    )
    return f"{shown} {_meta(node)}"


def _meta(node: Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)
