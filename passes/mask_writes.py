"""In-place writes: which of them reach a tensor, and which part of it they cover."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
from torch import SymInt, Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils._sympy.functions import Max

from attnopt.passes.mask_bounds import guarded, integer_of
from attnopt.passes.sizes import shape_of
from attnopt.shadow import written

#: Operations that end in an underscore or are marked as writing, yet change no element.
HARMLESS = frozenset({"aten::detach_", "aten::requires_grad_"})

#: The launch of a Triton kernel that the program itself holds: which of its tensors it writes to, its source says.
LAUNCH = "triton_kernel_wrapper_mutation"

#: Operations whose in-place form changes the dimensions and no element.
RESHAPED_IN_PLACE = frozenset(
    {"squeeze", "unsqueeze", "transpose", "t", "swapaxes", "swapdims", "resize", "set", "as_strided"}
)


def operation(node: Node) -> str:
    """The name of an ATen operation, without namespace and overload; in-place forms have the name of the plain one."""
    if not isinstance(node.target, OpOverload) or "out" in node.target._overloadname.split("_"):
        return ""
    name = node.target._schema.name.removeprefix("aten::")
    if name.startswith("__"):
        return IN_PLACE_OPERATORS.get(name, name)
    return name.removesuffix("_")


#: The methods behind `&=` and its like.
IN_PLACE_OPERATORS = {f"__i{name}__": f"__{name}__" for name in ("and", "or", "xor")}


def arguments(node: Node) -> Mapping[str, Any]:
    """The arguments of a call by their names in the schema, defaults included."""
    if not isinstance(node.target, OpOverload):
        return {}
    schema = node.target._schema.arguments
    given = {a.name: value for a, value in zip(schema, node.args, strict=False)}
    return {**{a.name: a.default_value for a in schema if a.has_default_value()}, **given, **node.kwargs}


def written_by(node: Node) -> Node | None:
    """The tensor that a node writes to, the first of several; None for most nodes."""
    return next(iter(targets(node)), None)


def targets(node: Node) -> list[Node]:
    """All tensors that a node writes to, those of lists included; of a Triton kernel, all that it is given."""
    if not isinstance(node.target, OpOverload):
        return node.all_input_nodes if getattr(node.target, "__name__", "") == LAUNCH else []
    schema = node.target._schema
    return written(node) if schema.is_mutable and schema.name not in HARMLESS else []


def writes_after(node: Node, end: Node | None) -> list[Node]:
    """Writes to the memory of `node` after it was made and before `end` reads it, in order; None: until the end."""
    found = {user for alias in sharing(node) for user in alias.users if alias in targets(user)}
    return sorted(w for w in found if node < w and (end is None or w < end))


def is_settled(node: Node) -> bool:
    """Whether all that read `node`, or views of it, do so after the last write to it."""
    writes = writes_after(node, None)
    return not writes or all(writes[-1] < reader for reader in _readers(node))


def _readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        if _shares(user, node):
            yield from _readers(user)
        elif user.op != "output":
            yield user


def sharing(node: Node) -> set[Node]:
    """All nodes whose values may share memory with that of `node`."""
    seen, pending = {node}, [node]
    while pending:
        near = {other for other in _neighbours(pending.pop()) if other not in seen}
        seen |= near
        pending.extend(near)
    return seen


def _neighbours(node: Node) -> Iterator[Node]:
    yield from (user for user in node.users if _shares(user, node))
    yield from (source for source in node.all_input_nodes if _shares(node, source))


def _shares(result: Node, source: Node) -> bool:
    """Whether `result` may be the memory of its argument `source`: by the schema, or by the storage of the values."""
    if not isinstance(result.target, OpOverload):
        return result.op == "call_function" and not _is_apart(result, source)
    if not _is_apart(result, source):
        return True
    held = arguments(result)
    marked = (held.get(a.name) for a in result.target._schema.arguments if a.alias_info is not None)
    return any(value is source or (isinstance(value, list | tuple) and source in value) for value in marked)


def _is_apart(a: Node, b: Node) -> bool:
    return _storages(a).isdisjoint(_storages(b))


def _storages(node: Node) -> set[int]:
    value = node.meta.get("val")
    tensors = value if isinstance(value, list | tuple) else [value]
    return {t.untyped_storage()._cdata for t in tensors if isinstance(t, Tensor)}


@dataclass(frozen=True, slots=True)
class Place:
    """Along one dimension: the elements start, start + 1, ... of `length`, or the single one at `start`."""

    start: sympy.Expr
    length: sympy.Expr
    is_single: bool = False


def covered(write: Node, base: Node) -> tuple[Place, ...] | None:
    """The part of `base` that `write` writes, one place a dimension; None where it is no plain block of `base`."""
    if not isinstance(write.meta.get("val"), Tensor):
        return None  # it writes to several tensors, or says nothing of what it writes
    target = written_by(write)
    return None if target is None else block_of(target, base)


def block_of(node: Node | None, base: Node) -> tuple[Place, ...] | None:
    """The part of `base` that `node` is, by slices and selections; None where it is no plain block of it."""
    steps: list[Node] = []
    while node is not None and node is not base:
        steps.append(node)
        node = _source_of_block(node)
    if node is None:
        return None
    places = [Place(sympy.Integer(0), sympy.sympify(size)) for size in shape_of(base)]
    for step in reversed(steps):
        if not _narrow(places, step):
            return None
    return tuple(places)


def _source_of_block(node: Node) -> Node | None:
    if written_by(node) is not None:
        return None if operation(node) in RESHAPED_IN_PLACE else written_by(node)
    if operation(node) not in ("slice", "select", "alias", "detach"):
        return None
    source = node.args[0]
    return source if isinstance(source, Node) else None


def _narrow(places: list[Place], step: Node) -> bool:
    """Restricts the places to what a slice or a select keeps; False if that cannot be told."""
    if operation(step) not in ("slice", "select"):
        return True
    held = arguments(step)
    kept = [k for k, place in enumerate(places) if not place.is_single]
    dim = held["dim"] if held["dim"] >= 0 else held["dim"] + len(kept)
    at, source = kept[dim], held["self"]
    if operation(step) == "select":
        index = start_of(held["index"], sympy.sympify(shape_of(source)[dim]))
        if index is not None:
            places[at] = Place(places[at].start + index, sympy.Integer(1), is_single=True)
        return index is not None
    start = start_of(held["start"], sympy.sympify(shape_of(source)[dim]))
    if start is None or held["step"] != 1:
        return False
    places[at] = Place(places[at].start + start, sympy.sympify(shape_of(step)[dim]))
    return True


def start_of(value: Any, size: sympy.Expr) -> sympy.Expr | None:
    """Where a slice or select starts, counted from the front; None if the sign or the size leave that open."""
    if value is None:
        return sympy.Integer(0)
    start = integer_of(value)
    if start is None:
        return None
    if _is_nonnegative(start) or _is_guarded(value, start):
        return start
    from_front = sympy.expand(start + size)
    return from_front if start.is_negative and _is_nonnegative(from_front) else None


def _is_nonnegative(expr: sympy.Expr) -> bool:
    """Whether expr >= 0 for certain; the larger of several is at least each of them."""
    if expr.is_nonnegative:
        return True
    for largest in expr.atoms(Max, sympy.Max):
        if expr.coeff(largest) == 1 and any(
            _is_nonnegative(sympy.expand(expr - largest + one)) for one in largest.args
        ):
            return True
    return False


def _is_guarded(value: Any, start: sympy.Expr) -> bool:
    """Whether a symbolic number is at least 0 wherever the guards of the graph hold."""
    held = value.meta.get("val") if isinstance(value, Node) else value
    facts = guarded(held.node.shape_env) if isinstance(held, SymInt) else []
    return any(_is_nonnegative(sympy.expand(start + fact)) for fact in facts)
