"""Says what it is that stands between Q K^T and the values where no linear attention is."""

from torch.fx import Node

from attnopt.passes.constants import constant
from attnopt.passes.layout import CASTS, is_copy
from attnopt.passes.linear_product import product_of
from attnopt.passes.mask_writes import arguments, operation

#: Deeper than any polynomial that people write.
DEEPEST = 12


def reason_for(node: Node) -> str:
    """Why the operation at `node` ends the reading: a polynomial of the scores by its degree, others by name."""
    degree = _degree(node)
    if degree is not None and degree > 1:
        return f"a polynomial of degree {degree} of the scores (a feature map of degree {degree}): no kernel states it"
    return f"{operation(node)} between Q K^T and the values: not linear in the keys"


def _degree(given: object, depth: int = 0) -> int | None:
    """The degree of a tensor as a polynomial of a product of tensors above it; None if it is no polynomial."""
    if constant(given) is not None:
        return 0
    if not isinstance(given, Node) or depth > DEEPEST:
        return None
    if product_of(given) is not None:
        return 1
    held, name = arguments(given), operation(given)
    if name in ("add", "sub", "rsub", "mul"):
        both = [_degree(held[x], depth + 1) for x in ("self", "other")]
        known = [n for n in both if n is not None]
        return (sum(known) if name == "mul" else max(known)) if len(known) == 2 else None
    first = _degree(given.args[0], depth + 1) if given.args else None
    if first is None:
        return None
    if name in ("pow", "square"):
        power = 2.0 if name == "square" else constant(held["exponent"])
        return int(power * first) if power is not None and power >= 0 and power.is_integer() else None
    is_linear = name in ("neg", "tril", "triu", "masked_fill") or is_copy(given) or given.target in CASTS
    return first if is_linear or (name == "div" and constant(held["other"])) else None
