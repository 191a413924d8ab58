"""The log decay of a linear attention as an operand: from how it is computed to a tensor of the graph.

A decay given as a base, base ** (i - j), becomes log(base) * (i - j): bases are taken to be positive, as the log decays
that a kernel gets are taken to be negative; of a negative base NaN comes out, never a wrong number.
"""

from dataclasses import dataclass
from math import log

import torch

from attnopt.passes.layout import Axes
from attnopt.passes.linear_coefficient import Coefficient, Const, Log, Negative, Read, Source, Times
from attnopt.passes.linear_places import Places
from attnopt.passes.linear_sign import is_log_of_whole_numbers, may_be_a_base
from attnopt.passes.mask_decay import DecayReading
from attnopt.passes.site import Filled, Operand, Roles
from attnopt.rule import Reject


@dataclass(frozen=True, slots=True)
class Monomial:
    """factor * (product of tensors) * (product of logarithms of tensors)."""

    factor: float = 1.0
    plain: tuple[Source, ...] = ()
    logs: tuple[Source, ...] = ()

    def times(self, other: "Monomial") -> "Monomial":
        """The product of both."""
        return Monomial(self.factor * other.factor, self.plain + other.plain, self.logs + other.logs)


def log_decay_operand(reading: DecayReading, roles: Roles) -> Operand | Filled:
    """Operand `log_decay`, (H,) or (B, H, Sq), in at least fp32. Raises Reject."""
    if reading.log_decay is None:
        raise Reject("there is no decay")
    layout = (roles.heads,) if reading.kind == "per_head" else (roles.batch, roles.heads, roles.query)
    found = monomial(reading.log_decay)
    tensors = [*((leaf, True) for leaf in found.logs), *((leaf, False) for leaf in found.plain)]
    if not tensors:
        return Filled(found.factor, layout)
    (first, is_log), *rest = tensors
    if any(also_log for _, also_log in rest):
        raise Reject("the decay is a product of logarithms", first.node)
    if reading.cumulative and is_log:
        raise Reject("the running sum of log decays is a logarithm", first.node)
    if is_log and not may_be_a_base(first.node):
        raise Reject(
            "the decay is a power, or a running product, of a tensor that may be negative; make it by sigmoid or exp, "
            "or give its logarithm",
            first.node,
        )
    if is_log_of_whole_numbers(first.node):
        raise Reject("the decay is the logarithm of whole numbers: it is 0 or infinite", first.node)
    times = tuple(Operand(leaf.node, _dims(leaf, roles)) for leaf, _ in rest)
    dtype = torch.promote_types(first.node.meta["val"].dtype, torch.float32)
    return Operand(
        first.node,
        _dims(first, roles),
        found.factor,
        times,
        dtype=dtype,
        function="differences" if reading.cumulative else "log" if is_log else "",
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


def _dims(leaf: Source, roles: Roles) -> tuple[Axes, ...]:
    axes = Places(roles).axes
    return tuple(() if role is None else axes[role] for role in leaf.roles)
