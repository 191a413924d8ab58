"""What the coverage benchmark runs: a subject is a model, its inputs and the family under which it is counted."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import coverage_zoo as zoo
import torch
from coverage_modes import Mode
from torch import Tensor, nn

BATCH, LENGTH, PADDING = 2, 20, 3


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model in fp32 with weights, and the arguments of its forward."""

    model: nn.Module
    inputs: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Subject:
    """prepare: the model for a mode; raises what the library raises when it does not build or run."""

    family: str
    name: str
    prepare: Callable[[Mode], Prepared]


class UnbuildableError(Exception):
    """No variant of the generic rule builds and runs."""


def hugging_face(family: str) -> list[Subject]:
    """One subject for each model class of the family in the installed transformers."""
    return [Subject(family, entry.model, Builder(entry)) for entry in zoo.entries(family)]


@dataclass(frozen=True, slots=True)
class Builder:
    """Builds a model by the first variant of the generic rule that runs."""

    entry: zoo.Entry

    def __call__(self, mode: Mode) -> Prepared:
        """The model in evaluation mode, and its inputs."""
        reasons: dict[str, None] = {}
        for number in range(len(zoo.variants())):
            try:
                return self._built(mode, number)
            except Exception as problem:  # noqa: BLE001 - a library's model may fail in any way; the row says how
                reasons[f"{type(problem).__name__}: {' '.join(str(problem).split())[:120]}"] = None
        raise UnbuildableError(" | ".join(list(reasons)[:2]))

    def _built(self, mode: Mode, number: int) -> Prepared:
        model = zoo.build(self.entry, mode.attention, number).eval()
        held = inputs(model, self.entry.family, mode)
        with torch.no_grad():
            model(**held)
        return Prepared(model, held)


def inputs(model: Any, family: str, mode: Mode) -> dict[str, Any]:
    """The arguments of the forward of a Hugging Face model: tokens, an image, a wave or a spectrogram."""
    draw = torch.Generator().manual_seed(1)
    match family:
        case "vision":
            held = {model.main_input_name: _image(model.config, draw)}
        case "audio":
            held = _sound(model, draw)
        case _:
            held = {"input_ids": _tokens(LENGTH, draw)}
    if family == "seq2seq" or (family == "audio" and model.config.is_encoder_decoder):
        held["decoder_input_ids"] = _tokens(LENGTH - 3, draw)
    if family in ("causal", "seq2seq"):
        held["use_cache"] = False
    if mode.mask == "left" and "input_ids" in held:
        held["attention_mask"] = left_padded(LENGTH)
    return held


def left_padded(length: int) -> Tensor:
    """(BATCH, length): the last sequence begins with padding."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[-1, :PADDING] = 0
    return mask


def _tokens(length: int, draw: torch.Generator) -> Tensor:
    return torch.randint(3, 100, (BATCH, length), generator=draw)


def _image(config: Any, draw: torch.Generator) -> Tensor:
    size = getattr(config, "image_size", None) or getattr(
        getattr(config, "vision_config", None), "image_size", None
    )
    height, width = size if isinstance(size, tuple | list) else (size or 32, size or 32)
    frames = (config.num_frames,) if hasattr(config, "num_frames") else ()
    return torch.randn(BATCH, *frames, getattr(config, "num_channels", 3) or 3, height, width, generator=draw)


def _sound(model: Any, draw: torch.Generator) -> dict[str, Any]:
    name, config = model.main_input_name, model.config
    if name != "input_features":
        return {name: torch.randn(BATCH, 1600, generator=draw)}
    bins = getattr(config, "num_mel_bins", None) or getattr(config, "feature_size", None) or 80
    frames = 2 * getattr(config, "max_source_positions", 32)
    return {name: torch.randn(BATCH, bins, frames, generator=draw)}
