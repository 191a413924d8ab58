"""What hides keys at a site: each source as it was read, and all of them together."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from attnopt.mask import FULL, Mask
from attnopt.passes.layout import Axes
from attnopt.passes.masks import MaskReading, Role
from attnopt.passes.site import Operand, Roles

#: Stand for dimensions that are no role, or only part of one.
MIXED: tuple[Role, ...] = ("x", "y")

#: Blockwise backward passes work from the logarithm of each row's sum, and cannot where that is a sum of such numbers.
LOST_IN_SUMS = (
    "a row that finite numbers hide altogether would get other gradients; "
    "hide keys with -inf, or by a single mask"
)
MIXED_FILLS = "rows that see no key would mix several fill values; one mask, or -inf, would not"
CANCELLED = (
    "numbers that hide keys and numbers as large that raise them are added to the same scores, which get lost "
    "between them; hide keys with -inf, or add no such numbers"
)
SWAMPED = (
    "numbers that hide keys are multiplied by a tensor, whose gradient they would swamp with their rounding; "
    "hide keys after the multiplication, or with -inf"
)
HALVED = (
    "torch.max halves the gradients of rows that a finite number hides altogether, which no kernel does; "
    "leave it out"
)


@dataclass(frozen=True, slots=True)
class Hidden:
    """One source of hidden keys: a mask, its tensors, and the value that hidden logits get.

    passes: gradients reach the scores under it, since the value was added to them; halves: half of them do.
    """

    mask: Mask
    operands: Mapping[str, Operand]
    fill: float
    passes: bool = False
    halves: bool = False
    otherwise: "tuple[Hidden, ...]" = ()  # the same, with less proven and more read from tensors


def together(hidden: Iterable[Hidden]) -> tuple[Mask, dict[str, Operand]]:
    """The keys that no source hides, and the tensors of all sources."""
    operands: dict[str, Operand] = {}
    mask: Mask = FULL
    for source in hidden:
        names = {name: _unused(name, operands) for name in source.operands}
        operands |= {names[name]: operand for name, operand in source.operands.items()}
        mask = mask & source.mask.renamed(names)
    return mask, operands


def operands_of(roles: Roles, reading: MaskReading, mask: Mask) -> dict[str, Operand]:
    """The tensors that a mask names, laid out along the roles of their dimensions."""
    axes: dict[Role | None, Axes] = {
        None: (), "b": roles.batch, "h": roles.heads, "i": roles.query, "j": roles.key
    }  # fmt: skip
    layouts = {"query_ids": (axes["b"], axes["i"]), "key_ids": (axes["b"], axes["j"])}
    return {
        name: Operand(
            leaf.node, tuple(axes[role] for role in leaf.roles), negated=leaf.negated,
            layout=layouts.get(name.rstrip("0123456789")),
        )
        for name, leaf in reading.leaves.items()
        if name in mask.operand_names()
    }  # fmt: skip


def visible_in(masks: Iterable[Mask]) -> Mask:
    """The keys that all of them leave visible."""
    result: Mask = FULL
    for mask in masks:
        result = result & mask
    return result


def _unused(name: str, taken: Mapping[str, object]) -> str:
    stem = name.rstrip("0123456789")
    candidates = (name, *(f"{stem}{n}" for n in range(1, len(taken) + 2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def lies_deeper(inner: Hidden, outer: Hidden, absorbing: float) -> bool:
    """Whether what `inner` hides is hidden once more by `outer`, and both absorb any score.

    Such keys lie lower by half as much again as those that `outer` hides alone: they have no weight in any row, as if
    the fill of `inner` were -inf, provided it leaves each query a key. A smaller number would be absorbed too.
    """
    low = max(inner.fill, outer.fill) <= absorbing and inner.fill <= outer.fill / 2
    return low and inner.mask & outer.mask == outer.mask


def whole(reading: MaskReading, roles: tuple[Role | None, ...]) -> MaskReading | None:
    """The reading, unless it depends on a dimension that is no role: no operand could be laid out."""
    if not {*MIXED} & {*roles}:
        return reading
    return None if reading.mask.operand_names() else replace(reading, otherwise=())
