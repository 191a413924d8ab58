"""An einsum of which one term is a factor of each position of the result: the einsum of the others, multiplied by it.

Code that divides a linear attention by its normaliser often does so in the einsum that ends it. Where the others hold
running sums of keys times values ("nde,nd,n->ne"), what they make is a recurrence, and the factor is none of it.
"""

from typing import Any

import torch
from torch import Tensor

from attnopt.passes.contraction import Letters, lettered

aten = torch.ops.aten


def _has_factor(equation: Any, *operands: Any, path: Any = None) -> bool:
    """Whether there is such a term beside two others, each of which varies along all that it varies along."""
    del path
    tensors = _tensors(operands)
    if not isinstance(equation, str) or "->" not in equation or len(tensors) != 3:
        return False
    alike = len({x.dtype for x in tensors}) == 1
    return (
        alike
        and not torch.is_autocast_enabled(tensors[0].device.type)
        and _factor(equation, tensors) is not None
    )


def without_factor(equation: str, *operands: Any, path: Any = None) -> Tensor:
    """torch.einsum(equation, *operands): the einsum of two of its three operands, times the third."""
    del path
    tensors = _tensors(operands)
    place = _factor(equation, tensors)
    if place is None:
        return torch.einsum(equation, *tensors)
    terms, out = equation.replace(" ", "").split("->")
    others = ",".join(term for n, term in enumerate(terms.split(",")) if n != place)
    product = torch.einsum(f"{others}->{out}", *(x for n, x in enumerate(tensors) if n != place))
    letters, made = _letters(equation, tensors)
    order = [letters[place].index(x) for x in made if x in letters[place]]
    spread = tuple(slice(None) if x in letters[place] else None for x in made)
    return product * tensors[place].permute(order)[spread]


def _tensors(operands: tuple[Any, ...]) -> list[Tensor]:
    given = operands[0] if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    return list(given)


def _factor(equation: str, tensors: list[Tensor]) -> int | None:
    """The place of the factor, or None."""
    letters, out = _letters(equation, tensors)
    if any(len(set(term)) < len(term) for term in letters):
        return None
    for place, mine in enumerate(letters):
        others = [set(term) for n, term in enumerate(letters) if n != place]
        if all(set(mine) <= term for term in (set(out), *others)) and len(mine) + 1 == len(out):
            return place
    return None


def _letters(equation: str, tensors: list[Tensor]) -> tuple[list[Letters], Letters]:
    terms, out = equation.replace(" ", "").split("->")
    found = [lettered(term, x.dim()) for term, x in zip(terms.split(","), tensors, strict=True)]
    dots = max((x.dim() - len(t.replace("...", "")) for t, x in zip(terms.split(","), tensors, strict=True)))
    hidden = dots if "..." in out else 0
    return found, lettered(out, len(out.replace("...", "")) + hidden)


#: Operator -> when it may be spelled out, and how.
EXPANSIONS = dict.fromkeys((torch.functional.einsum, aten.einsum.default), (_has_factor, without_factor))
