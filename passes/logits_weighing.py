"""Hidden keys that keep a finite logit, such as -10000: where that is all that becomes of them, a kernel can say so.

Megatron-LM, VITS and GPT hide keys like that. Nothing proves that the visible scores of a row lie far above.
"""

from collections.abc import Callable, Sequence
from math import isfinite

from attnopt.passes.terms import Fill, Term, floors, held_as
from attnopt.rule import Reject


def hidden_number(fills: Sequence[Fill], terms: Sequence[Term], is_shift: Callable[[Term], bool]) -> float:
    """The one logit that all hidden keys have. is_shift: whether a term changes the logits of a whole row alike.

    Raises Reject where there are several, or where the scores change once they were filled.
    """
    numbers = {held_as(fill.value, fill.casts) for fill in fills}
    if len(numbers) == 1 and isfinite(min(numbers)) and _lie_last(fills, terms, is_shift):
        return min(numbers)
    raise weighs_beside_others(fills)


def weighs_beside_others(fills: Sequence[Fill]) -> Reject:
    """The refusal of a fill that no kernel states."""
    fill = max(fills, key=lambda fill: fill.value)
    return Reject(
        f"masked scores become {fill.value:g}, which still weighs, and other masks or biases change the same rows; "
        f"fill with -inf, or with torch.finfo({str(fill.dtype).removeprefix('torch.')}).min",
        fill.node,
    )


def _lie_last(fills: Sequence[Fill], terms: Sequence[Term], is_shift: Callable[[Term], bool]) -> bool:
    if any(floors(fill.casts) for fill in fills):
        return False
    return all(_is_before(f, t) if is_shift(t) else _is_before(t, f) for f in fills for t in terms)


def _is_before(one: Fill | Term, other: Fill | Term) -> bool:
    return one.at is not None and other.at is not None and one.at < other.at
