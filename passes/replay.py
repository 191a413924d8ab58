"""Runs the part of a shadow between a site's operands and its root, in fp64, at its own or at smaller sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

from attnopt.buffers import BUFFER
from attnopt.passes import emit
from attnopt.passes.constants import uniform
from attnopt.passes.layout import dropout_rate
from attnopt.passes.mask_literals import Planes, plane
from attnopt.passes.mask_writes import is_settled, writes_after
from attnopt.passes.sizes import Concrete, seen_float, size_of
from attnopt.passes.softmax_nodes import same_value
from attnopt.passes.terms import NEGLIGIBLE
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
    """nodes: what has to run, in order, writes in place included; leaves: where it starts; root: where it ends.

    twins: nodes that compute what a leaf does, with that leaf.
    """

    nodes: tuple[Node, ...]
    leaves: tuple[Node, ...]
    root: Node
    twins: Mapping[Node, Node] = field(default_factory=dict)

    @classmethod
    def of(cls, shadow: Shadow, site: Site) -> "Replay":
        """The slice of one site."""
        leaves = tuple(emit.leaves(site))
        if site.body:
            inside = {*site.body}
            entering = (n for node in site.body for n in node.all_input_nodes if n not in inside)
            return cls(site.body, tuple(dict.fromkeys((*leaves, *entering))), site.root)
        seen: set[Node] = set()
        twins: dict[Node, Node] = {}
        pending = [site.root]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if (twin := _twin(node, leaves)) is not None:
                twins[node] = twin
                continue
            if node not in leaves or not is_settled(node):
                pending.extend(writes_after(node, site.root))
            if node not in leaves:
                pending.extend(node.all_input_nodes)
        needed = seen - {*leaves} - {*twins}
        return cls(tuple(sorted(needed, key=lambda n: shadow.order[n])), leaves, site.root, twins)

    def run(self, values: Mapping[Node, Any], sizes: Concrete) -> Tensor:
        """The root's value. values: of the leaves; sizes: numbers for the graph's sizes."""
        held = {**values, **{twin: values[leaf] for twin, leaf in self.twins.items()}}
        result: Tensor = evaluate(self.nodes, held, sizes)[self.root]
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


def _twin(node: Node, leaves: Sequence[Node]) -> Node | None:
    """The leaf of which `node` is a second computation, from the same by the same operations."""
    if node.op != "call_function" or node in leaves:
        return None
    return next((leaf for leaf in leaves if leaf.target is node.target and same_value(leaf, node)), None)


def evaluate(
    nodes: Sequence[Node],
    values: Mapping[Node, Any],
    sizes: Concrete,
    shapes: Mapping[Node, Sequence[int]] | None = None,
) -> dict[Node, Any]:
    """The values of `nodes`, run in this order in fp64, and those given; writes in place change what they write to.

    shapes: of nodes whose values are to have other shapes than `sizes` say. Raises RuntimeError where they cannot.
    """
    known: dict[Node, Any] = {n: v.clone() if isinstance(v, Tensor) else v for n, v in values.items()}
    free = torch.Generator().manual_seed(1)
    for node in nodes:
        shape = (shapes or {}).get(node)
        known[node] = _wide(_rounded(node, _run(node, known, sizes, free, shape)))
        if shape is not None and tuple(known[node].shape) != tuple(shape):
            raise RuntimeError(
                f"{node.name} has the shape {tuple(known[node].shape)} instead of {tuple(shape)}"
            )
    return known


def _run(
    node: Node,
    known: Mapping[Node, Any],
    sizes: Concrete,
    free: torch.Generator,
    shape: Sequence[int] | None = None,
) -> Any:
    settled = _settled(node.meta.get("val"), sizes)
    if settled is not None:
        return settled
    if node.op == "placeholder":
        return _input(node, sizes, free)
    if node.op == "get_attr":
        held = getattr(node.graph.owning_module, str(node.target))
        return held.detach().cpu() if isinstance(held, Tensor) else held
    if _drops(node):
        return known[node.args[0]]  # type: ignore[index]
    shaped = _packet(node) in _SHAPED
    kept = sizes if shaped else Concrete()
    args, kwargs = pytree.tree_map(lambda x: _argument(x, known, kept), (node.args, node.kwargs))
    if node.target == aten.scaled_dot_product_attention.default:
        args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
        kwargs = kwargs | {"dropout_p": 0.0} if "dropout_p" in kwargs else kwargs
    if _makes_floats(node):
        args = pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) else x, args)
    return node.target(*(args if shape is None else resized(node, args, shape)), **kwargs)  # type: ignore[operator]


def resized(node: Node, args: Sequence[Any], shape: Sequence[int]) -> list[Any]:
    """The arguments with which the node makes a tensor of that shape."""
    if not isinstance(node.target, OpOverload):
        return list(args)
    names = [a.name for a in node.target._schema.arguments]
    if node.target == aten.unflatten.int:
        dim = int(args[1]) % args[0].dim()
        return [args[0], dim, list(shape[dim : dim + len(args[2])])]
    return [
        list(shape) if name in ("size", "shape") else value for name, value in zip(names, args, strict=False)
    ]


def _settled(value: Any, sizes: Concrete) -> float | None:
    """A number that does not follow from the sizes at hand: one read as it is now, or that guards leave one value."""
    if isinstance(value, torch.SymFloat):
        return seen_float(value)
    implied = (
        isinstance(value, torch.SymInt) and not value.node.expr.is_number and type(size_of(value)) is int
    )
    return sizes.of(value) if implied else None


def _drops(node: Node) -> bool:
    """Whether the node is dropout: its random numbers are no part of what is compared."""
    return node.target == aten.dropout.default and dropout_rate(node) < 1


def _makes_floats(node: Node) -> bool:
    """Whether integers become floating point here, as in arange(n) / 2: by themselves they would become single ones."""
    made = node.meta.get("val")
    given = [n.meta.get("val") for n in node.all_input_nodes]
    tensors = [value for value in given if isinstance(value, Tensor)]
    is_float = isinstance(made, Tensor) and made.is_floating_point()
    return (
        is_float
        and bool(tensors)
        and not any(t.is_floating_point() or t.is_complex() or t.dtype == torch.bool for t in tensors)
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
            wide = torch.complex128 if value.is_complex else value
            return torch.float64 if value.is_floating_point else wide
    return value


def _rounded(node: Node, value: Any) -> Any:
    """A number that the graph makes of nothing but numbers, as its dtype holds it: so the scale is read, too.

    Not one that hides keys: a mask may compare it with the same number made of a tensor, which nothing rounds.
    """
    made = node.meta.get("val")
    if not (isinstance(made, Tensor) and made.is_floating_point()):
        return value
    number = uniform(node)
    return value if number is None or abs(number) >= -NEGLIGIBLE else value.to(made.dtype)


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
    buffer = node.meta.get(BUFFER)
    if buffer is not None and buffer.read and isinstance(buffer.handed, Planes):
        return plane(buffer.handed, [sizes.of(s) for s in value.shape], value.dtype)
    if buffer is not None and buffer.read:
        return buffer.value.detach().cpu().clone()
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
    number |= {twin: number[leaf] for twin, leaf in replay.twins.items()}
    lines = [f"{number[n]}: {_told(n)} {_shown(n, number)}" for n in replay.nodes]
    held = [f"{number[n]}: {_meta(n)}" for n in replay.leaves]
    return "\n".join([str(site.spec), *held, *lines])


def _told(node: Node) -> str:
    """What a node does; of a tensor that the program holds, its elements."""
    if node.op == "call_function":
        return str(node.target)
    held = getattr(node.graph.owning_module, str(node.target), None) if node.op == "get_attr" else None
    if not isinstance(held, Tensor):
        return node.op
    elements = held.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{node.op} {sha256(elements.numpy().tobytes()).hexdigest()}"


def _shown(node: Node, number: Mapping[Node, int]) -> str:
    shown = pytree.tree_map(
        lambda x: f"%{number[x]}" if isinstance(x, Node) else x, (node.args, dict(node.kwargs))
    )
    return f"{shown} {_meta(node)}"


def _meta(node: Node) -> str:
    value = node.meta.get("val")
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)
