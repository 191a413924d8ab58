"""Takes the tensors that weigh pairs of positions apart, where a row or a column of them has a factor of its own."""

from dataclasses import replace

from torch import Tensor
from torch.fx import Node

from attnopt.passes.layout import Dims, Space
from attnopt.passes.linear_chain import Weighting, end_of
from attnopt.passes.linear_product import End
from attnopt.passes.mask_writes import arguments, operation, writes_after
from attnopt.passes.site import flat, peel

#: Operations on two tensors, and whether the second one divides.
DIVIDES = {"mul": False, "multiply": False, "div": True, "divide": True, "true_divide": True}


def taken_apart(space: Space, found: Weighting) -> Weighting | None:
    """The same weighting with one factor more, or None where nothing can be taken apart.

    A decay matrix divided by its own row sums (Sun et al. 2023, arXiv:2307.08621, section 2.3) is two factors.
    """
    for place, factor in enumerate(found.factors):
        node, dims, number = peeled(space, factor)
        parts = _parts(space, node, dims, factor)
        if parts is not None:
            rest = (*found.factors[:place], *found.factors[place + 1 :])
            left, right, divides = parts
            factors, divisors = ((left,), (right,)) if divides else ((left, right), ())
            return replace(
                found,
                scale=found.scale * number,
                factors=rest + factors,
                divisors=found.divisors + divisors,
            )
    return None


def peeled(space: Space, end: End) -> tuple[Node, Dims, float]:
    """A factor without its views, casts and constants; a number that depends on sizes as it is."""
    if not isinstance(end.node.meta.get("val"), Tensor):
        return end.node, (), 1.0
    return peel(space, end.node, end.dims)


def _parts(space: Space, node: Node, dims: Dims, factor: End) -> tuple[End, End, bool] | None:
    """Both operands of a product or a quotient, if one of them varies along less than the result."""
    divides = DIVIDES.get(operation(node))
    if divides is None or writes_after(node, factor.user):
        return None
    held = arguments(node)
    if held.get("rounding_mode") or not all(isinstance(held[name], Node) for name in ("self", "other")):
        return None
    left, right = (end_of(held[name], dims, node) for name in ("self", "other"))
    whole = set(flat(space, dims))
    narrow = any(set(flat(space, end.dims)) < whole for end in (left, right))
    return (left, right, divides) if narrow else None
