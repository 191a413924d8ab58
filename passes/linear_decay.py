"""The log decay of a linear attention as an operand: from how it is computed to a tensor of the graph.

A decay given as a base, base ** (i - j), becomes log(base) * (i - j): bases are taken to be positive, as the log decays
that a kernel gets are taken to be negative; of a negative base NaN comes out, never a wrong number.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import log
from types import MappingProxyType

import torch

from attnopt.passes.layout import Axes
from attnopt.passes.mask_bounds import Role
from attnopt.passes.mask_decay import Coefficient, Const, DecayReading, Log, Negative, Read, Times
from attnopt.passes.mask_formula import Number
from attnopt.passes.mask_numbers import compute
from attnopt.passes.mask_reader import At, Rule, Value
from attnopt.passes.mask_rules import RULES
from attnopt.passes.masks import Leaf
from attnopt.passes.site import Filled, Operand, Roles
from attnopt.rule import Reject

LN2 = log(2.0)


def _in_base_e(function: Callable[[Number], Number]) -> Rule:
    def rule(at: At) -> Value:
        return at.logic.lift(function, at.numbers(at.args["self"]))

    return rule


#: The rules of masks, and powers of two in base e, so that one form of a decay has to be known.
DECAY_RULES: Mapping[object, Rule] = MappingProxyType(
    {
        **RULES,
        "exp2": _in_base_e(lambda x: compute("exp", compute("mul", x, LN2))),
        "log2": _in_base_e(lambda x: compute("div", compute("log", x), LN2)),
    }
)


@dataclass(frozen=True, slots=True)
class Monomial:
    """factor * (product of tensors) * (product of logarithms of tensors)."""

    factor: float = 1.0
    plain: tuple[Leaf, ...] = ()
    logs: tuple[Leaf, ...] = ()

    def times(self, other: "Monomial") -> "Monomial":
        """The product of both."""
        return Monomial(self.factor * other.factor, self.plain + other.plain, self.logs + other.logs)


def log_decay_operand(reading: DecayReading, roles: Roles) -> Operand | Filled:
    """Operand `log_decay`, (H,) or (B, H, Sq), in at least fp32. Raises Reject."""
    if reading.log_decay is None or reading.cumulative:
        raise Reject("the running sum of log decays is at hand, but not the log decays themselves")
    layout = (roles.heads,) if reading.kind == "per_head" else (roles.batch, roles.heads, roles.query)
    found = monomial(reading.log_decay)
    tensors = [*((leaf, True) for leaf in found.logs), *((leaf, False) for leaf in found.plain)]
    if not tensors:
        return Filled(found.factor, layout)
    (first, is_log), *rest = tensors
    if any(also_log for _, also_log in rest):
        raise Reject("the decay is a product of logarithms", first.node)
    times = tuple(Operand(leaf.node, _dims(leaf, roles)) for leaf, _ in rest)
    dtype = torch.promote_types(first.node.meta["val"].dtype, torch.float32)
    return Operand(
        first.node,
        _dims(first, roles),
        found.factor,
        times,
        dtype=dtype,
        function="log" if is_log else "",
        layout=layout,
    )


def monomial(found: Coefficient) -> Monomial:
    """A coefficient multiplied out. Raises Reject where it is no single product."""
    match found:
        case Const(value):
            return Monomial(value)
        case Read(leaf):
            return Monomial(plain=(leaf,))
        case Negative(of):
            return Monomial(-1.0).times(monomial(of))
        case Times(left, right):
            return monomial(left).times(monomial(right))
        case Log(of):
            return _log(monomial(of))


def _log(found: Monomial) -> Monomial:
    match found:
        case Monomial(factor, (), ()) if factor > 0:
            return Monomial(log(factor))
        case Monomial(1.0, (leaf,), ()):
            return Monomial(logs=(leaf,))
    raise Reject("the decay is the logarithm of more than one tensor of the graph")


def _dims(leaf: Leaf, roles: Roles) -> tuple[Axes, ...]:
    axes: dict[Role | None, Axes] = {
        None: (),
        "b": roles.batch,
        "h": roles.heads,
        "i": roles.query,
        "j": roles.key,
    }
    return tuple(axes[role] for role in leaf.roles)
