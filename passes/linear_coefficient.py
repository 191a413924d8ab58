"""Numbers that decay matrices are made of, as plain arithmetic on tensors that the graph holds."""

from dataclasses import dataclass

import sympy
from torch.fx import Node

from attnopt.passes.mask_formula import Call, Data, NotUnderstood, Number
from attnopt.passes.mask_numbers import is_constant
from attnopt.passes.mask_reader import MaskReader
from attnopt.passes.mask_writes import writes_after
from attnopt.passes.sizes import Size, is_one, shape_of


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the graph; roles: the name of the position that each dimension counts, None for one of size 1."""

    node: Node
    roles: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Const:
    """A number."""

    value: float


@dataclass(frozen=True, slots=True)
class Read:
    """A tensor of the graph."""

    leaf: Source


@dataclass(frozen=True, slots=True)
class Negative:
    """-of."""

    of: "Coefficient"


@dataclass(frozen=True, slots=True)
class Log:
    """The natural logarithm of `of`."""

    of: "Coefficient"


@dataclass(frozen=True, slots=True)
class Times:
    """left * right."""

    left: "Coefficient"
    right: "Coefficient"


#: How to compute a log decay: plain arithmetic on tensors that the graph holds.
Coefficient = Const | Read | Negative | Log | Times


def coefficient(reader: MaskReader, leaf: Number, roles: str = "h") -> Coefficient:
    """How to compute a number that depends on positions of these roles only."""
    if is_constant(leaf):
        return Const(float(leaf))
    found = find_tensor(reader, leaf, roles)
    if found is not None:
        return Read(found)
    match leaf:
        case Call("neg", (argument,)):
            return times(Const(-1.0), coefficient(reader, argument, roles))
        case Call("log", (argument,)):
            return Log(coefficient(reader, argument, roles))
        case Call("mul", (left, right)):
            return times(coefficient(reader, left, roles), coefficient(reader, right, roles))
        case sympy.Expr() if leaf.could_extract_minus_sign():
            return times(Const(-1.0), coefficient(reader, -leaf, roles))
    raise NotUnderstood


def find_tensor(reader: MaskReader, number: Number, allowed: str) -> Source | None:
    """The first tensor of the graph whose element is `number` everywhere, if it has positions of these kinds only."""
    own = source_at(reader, number.node, number.index, allowed) if isinstance(number, Data) else None
    if own is not None:
        return own
    for (node, index), held in reader.seen.items():
        if isinstance(held, dict) and len(held) == 1 and number in held:
            found = source_at(reader, node, index, allowed)
            if found is not None:
                return found
    return None


def source_at(reader: MaskReader, node: Node, index: tuple[sympy.Expr, ...], allowed: str) -> Source | None:
    """The tensor, as in `_source`, if its positions are of these kinds only."""
    found = _source(reader, node, index)
    if found is None or not all(role is None or role[0] in allowed for role in found.roles):
        return None
    return found


def _source(reader: MaskReader, node: Node, index: tuple[sympy.Expr, ...]) -> Source | None:
    """The tensor, if each of its dimensions runs over one position, whole, and nothing writes to it later."""
    sizes = shape_of(node)
    roles = tuple(_role(reader, e, size) for e, size in zip(index, sizes, strict=True))
    known = [role for role in roles if role is not None]
    fits = all(role is not None or is_one(size) for role, size in zip(roles, sizes, strict=True))
    return (
        Source(node, roles)
        if fits and len(known) == len(set(known)) and not writes_after(node, None)
        else None
    )


def _role(reader: MaskReader, at: sympy.Expr, size: Size) -> str | None:
    """The name of the position that a dimension of `size` runs over; None where there is none."""
    count = reader.logic.bounds.counts.get(at)
    return at.name if count is not None and sympy.expand(count - size) == 0 else None


def times(left: Coefficient, right: Coefficient) -> Coefficient:
    """The product, without factors of 1 and double signs."""
    match left, right:
        case Const(a), Const(b):
            return Const(a * b)
        case (Const(1.0), other) | (other, Const(1.0)):
            return other
        case (Const(-1.0), other) | (other, Const(-1.0)):
            return other.of if isinstance(other, Negative) else Negative(other)
    return Times(left, right)
