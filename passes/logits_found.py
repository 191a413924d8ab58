"""What was found between the scaled scores and the softmax."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from attnopt.mask import FULL, Mask
from attnopt.passes.site import Filled, Operand
from attnopt.spec import Alibi, EmptyRow


@dataclass(frozen=True, slots=True)
class Logits:
    """What the spec says about masks and biases, and the tensors it needs for that."""

    mask: Mask = FULL
    empty_row: EmptyRow = EmptyRow.NEVER
    bias: tuple[str, ...] = ()
    operands: Mapping[str, Operand] = field(default_factory=dict)
    otherwise: tuple[
        tuple[Mask, Mapping[str, Operand]], ...
    ] = ()  # other words for the mask, and its tensors
    forward_only: str = ""  # why gradients may be others than the graph's
    keys: tuple[Operand, ...] = ()  # what the keys are multiplied with
    values: tuple[Operand, ...] = ()  # what the values are multiplied with
    alibi: Alibi | None = None  # a bias that is linear in the distance, of which no tensor is needed
    slopes: Operand | Filled | None = None  # its operand
    hidden_logit: float | None = None  # the logit of keys that the mask hides, where it still weighs
    plain: "Logits | None" = None  # the same logits with that bias as a tensor
