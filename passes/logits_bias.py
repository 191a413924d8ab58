"""Tensors that are added to the scores, as operands of a kernel."""

from collections.abc import Iterable
from functools import reduce

import torch
from torch import Tensor
from torch.fx import Node

from attnopt.passes.layout import Axes, Dims, Space
from attnopt.passes.mask_writes import arguments, operation, writes_after
from attnopt.passes.scores_factors import numbers_at, numbers_written
from attnopt.passes.site import Operand, Roles
from attnopt.passes.terms import NEGLIGIBLE, Fill, Term, floors, held_as, narrowest
from attnopt.rule import Reject

#: No score comes near this.
BEYOND_SCORES = 1e30


def bias_of(space: Space, roles: Roles, term: Term) -> Operand:
    """What is added, as a number: True counts 1."""
    held = term.node.meta["val"].dtype
    dims = space.resolve(term.dims)
    times = tuple(factor_of(space, roles, factor) for factor in term.times)
    summed = _sum_type(term)
    if hiding_number(term) > -torch.inf and narrowest(term.casts, summed) != summed:
        raise Reject(
            f"a large number may be added to scores in {str(summed).removeprefix('torch.')}, and the sums are rounded "
            "to a narrower type, which takes the scores from rows without keys; cast before it is added",
            term.node,
        )
    if not held.is_floating_point:
        return Operand(term.node, dims, term.factor, times, dtype=torch.float32)
    narrow = narrowest(term.casts, held)
    if narrow != held and (times or torch.finfo(narrow).max < BEYOND_SCORES):
        raise Reject("a bias is added before the scores are cast to a type that may not hold it", term.node)
    if floors(term.casts):
        raise Reject(
            f"scores with a bias are raised to at least {floors(term.casts)[0]:g}, which rows without keys notice; "
            "leave the lower bound out",
            term.node,
        )
    # What lies beyond so wide a range with a score lies beyond it without.
    stored = narrow if narrow != held else None
    grows = bool(times) or abs(term.factor) > 1
    return Operand(term.node, dims, term.factor, times, dtype=stored or (_widest(term) if grows else None))


def factor_of(space: Space, roles: Roles, term: Term) -> Operand:
    """What multiplies a bias, and the scores with it."""
    dims = space.resolve(term.dims)
    if set(merged(dims)) & set(roles.key):
        raise Reject("scores and a bias are multiplied by a tensor that varies along the keys", term.node)
    return Operand(term.node, dims, term.factor, inverse=term.inverse)


def hiding_number(term: Term) -> float:
    """A number by which a tensor may hide keys, as one so large stands in what makes it; -inf where none does."""
    sizes = (abs(number * term.factor) for number in numbers_written(term.node))
    return -max((size for size in sizes if -NEGLIGIBLE <= size < torch.inf), default=torch.inf)


def check_fits(fills: Iterable[Fill], terms: Iterable[Term]) -> None:
    """Raises Reject if a finite number that hides keys is infinite in a type that the scores are cast to.

    Queries without keys are NaN then, and with them all that sees them, which nobody wrote down; the fp64 check, which
    rounds nothing, could not tell.
    """
    written = [(fill, fill.value) for fill in fills] + [(term, hiding_number(term)) for term in terms]
    for each, number in written:
        if held_as(number, each.casts) == -torch.inf < number:
            held = str(narrowest(each.casts, torch.float64)).removeprefix("torch.")
            raise Reject(
                f"keys are hidden by {number:.3g}, which is -inf in {held}, to which the scores are cast, so that a "
                f"query without keys becomes NaN; hide them with a number that {held} holds, or cast to no other type",
                each.node,
            )


#: Operations that hand numbers on with their sign.
_KEEP_SIGNS = frozenset(
    {
        "where", "masked_fill", "full", "full_like", "new_full", "to", "_to_copy", "unsqueeze", "squeeze", "expand",
        "view", "reshape", "slice", "select", "permute", "transpose", "mT", "clone", "contiguous", "roll", "flip",
        "repeat", "tile", "index", "index_select", "gather", "cat", "stack", "triu", "tril", "scalar_tensor", "add",
        "lift_fresh_copy", "minimum", "expand_as", "movedim", "unflatten", "flatten", "repeat_interleave",
    }
)  # fmt: skip


def only_lowers(node: Node) -> bool:
    """Whether all numbers behind an added tensor are below 0 or small, and nothing on their way turns one around."""
    pending, seen = [node], {node}
    while pending:
        here = pending.pop()
        made = here.meta.get("val")
        if not isinstance(made, Tensor) or not made.is_floating_point() or here.op != "call_function":
            continue
        turns = operation(here) not in _KEEP_SIGNS or arguments(here).get("alpha", 1) != 1
        if turns or any(number >= -NEGLIGIBLE for number in numbers_at(here)):
            return False
        above = {n for n in (*here.all_input_nodes, *writes_after(here, None)) if n not in seen}
        seen.update(above)
        pending.extend(above)
    return True


def merged(dims: Dims) -> Axes:
    """All axes of a tensor."""
    return tuple(axis for axes in dims for axis in axes)


def _sum_type(term: Term) -> torch.dtype:
    """The dtype of the scores with the term added to them."""
    value = None if term.at is None else term.at.meta["val"]
    held = term.node.meta["val"].dtype
    return value.dtype if isinstance(value, Tensor) and value.is_floating_point() else held


def _widest(term: Term) -> torch.dtype:
    """The dtype in which a graph multiplies what is added: that of the sum, and of what multiplies it."""
    values = [n.meta["val"] for n in (term.at, *(factor.node for factor in term.times)) if n is not None]
    dtypes = (value.dtype for value in values if isinstance(value, Tensor) and value.dtype.is_floating_point)
    return reduce(torch.promote_types, dtypes, term.node.meta["val"].dtype)
