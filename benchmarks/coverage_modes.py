"""The ways in which a model is run: attention spelling, mask, dtype, training or not, static or dynamic sizes."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Mode:
    """attention: "eager" or "sdpa". mask: "none" or "left" (an attention_mask, left-padded). dtype: a key of DTYPES."""

    attention: str = "eager"
    mask: str = "none"
    dtype: str = "fp32"
    training: bool = False
    dynamic: bool = False

    def __str__(self) -> str:
        run, sizes = "train" if self.training else "eval", "dynamic" if self.dynamic else "static"
        return f"{self.attention}-{self.mask}-{self.dtype}-{run}-{sizes}"

    @classmethod
    def parse(cls, text: str) -> "Mode":
        """The mode that `str` gave."""
        attention, mask, dtype, run, sizes = text.split("-")
        return cls(attention, mask, dtype, run == "train", sizes == "dynamic")


PLAIN, PADDED, TRAINING, DYNAMIC = Mode(), Mode(mask="left"), Mode(training=True), Mode(dynamic=True)
#: The committed result: the modes of every model of a family, each other than the plain one in what a figure is about.
COMMITTED: Mapping[str, tuple[Mode, ...]] = {
    "causal": (PLAIN, PADDED, TRAINING, DYNAMIC),
    "masked": (PLAIN, PADDED, TRAINING),
    "seq2seq": (PLAIN, PADDED, TRAINING),
    "vision": (PLAIN,),
    "audio": (PLAIN,),
}
#: And for one in SAMPLE of the models that take text.
SAMPLE = 8
SAMPLED = (
    Mode(attention="sdpa"), Mode(attention="sdpa", mask="left"), Mode(dtype="bf16"), Mode(mask="left", training=True),
    Mode(mask="left", dynamic=True), Mode(dtype="bf16", training=True),
)  # fmt: skip
OTHER_FAMILIES = (PLAIN, TRAINING, DYNAMIC)


def committed(family: str, number: int) -> tuple[Mode, ...]:
    """The modes of the model with this number in its family."""
    modes = COMMITTED.get(family, OTHER_FAMILIES)
    return modes + SAMPLED if PADDED in modes and number % SAMPLE == 0 else modes


def every_mode() -> tuple[Mode, ...]:
    """The full product."""
    return tuple(
        Mode(*given)
        for given in product(("eager", "sdpa"), ("none", "left"), DTYPES, (False, True), (False, True))
    )
