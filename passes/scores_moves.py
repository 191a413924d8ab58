"""Where reading the scores goes on above one operation, and what its steps have in common."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.constants import present
from attnopt.passes.layout import Dims, broadcast_up
from attnopt.passes.sizes import shape_of
from attnopt.passes.terms import Scores
from attnopt.rule import Reject

aten = torch.ops.aten

#: A value above, its dimensions, and what is known of the scores by then.
Move = tuple[Node, Dims, Scores]
Step = Callable[[Node, Dims, Scores], list[Move]]


def functional(node: Node) -> Any:
    """The out-of-place form of an in-place overload: its value is what the in-place one returns."""
    target = node.target
    name = getattr(getattr(target, "_schema", None), "name", "")
    if not name.endswith("_") or name.endswith("__"):
        return target
    packet = getattr(aten, name.removeprefix("aten::").removesuffix("_"), None)
    return getattr(packet, target._overloadname, target)  # type: ignore[union-attr]


def settled(here: Scores) -> Scores:
    """The scores with the symbolic floats of their scale taken as the numbers that they are now.

    For whatever stands inside that scale and is a number in the spec; see `constants.present`.
    """
    scale, kept = here.scale, []
    for factor in here.factors:
        number = present(factor.node)
        if number is None or (factor.inverse and number == 0):
            kept.append(factor)
        else:
            scale = scale / number if factor.inverse else scale * number
    return replace(here, scale=scale, factors=tuple(kept))


def need_uncapped(here: Scores, node: Node, what: str) -> None:
    """Raises Reject for what stands inside a soft cap."""
    if here.softcap is not None:
        raise Reject(f"{what} inside a soft cap is not understood", node, len(here.path))


def need_unscaled(here: Scores, node: Node, what: str) -> None:
    """What stands inside a scale that is data of unknown sign may come out as its opposite."""
    if here.factors:
        advice = "; scale the scores first, or by a number"
        raise Reject(
            f"{what} inside a scale that is a tensor is not understood{advice}", node, len(here.path)
        )


def name_of(node: Node) -> str:
    """The operator, as the user knows it."""
    return str(getattr(getattr(node.target, "_schema", None), "name", node.target))


def is_tensor(value: Any) -> bool:
    """Whether a value is a node that holds a tensor."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


def up(scores: Node, dims: Dims, here: Scores) -> Move:
    """To an operand that may be broadcast to the result."""
    return scores, broadcast_up(dims, shape_of(scores)), here
