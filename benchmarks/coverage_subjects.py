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
        held = runnable(model, self.entry.family, mode)
        return Prepared(model, held)


def runnable(model: Any, family: str, mode: Mode) -> dict[str, Any]:
    """The first arguments with which the model runs; raises what the last ones made it raise."""
    *others, last = arguments(model, family, mode)
    for held in others:
        try:
            with torch.no_grad():
                model(**held)
        except Exception:  # noqa: BLE001, S112 - the next arguments are tried
            continue
        return held
    with torch.no_grad():
        model(**last)
    return last


def arguments(model: Any, family: str, mode: Mode) -> list[dict[str, Any]]:
    """What the forward of a Hugging Face model may want: tokens, an image, a film, a wave or a spectrogram."""
    name, config = model.main_input_name, model.config
    draw = torch.Generator().manual_seed(1)
    held: list[dict[str, Any]] = [{name: x} for x in _mains(name, config, family, draw)]
    both = family == "seq2seq" or (family == "audio" and config.is_encoder_decoder)
    more = {"decoder_input_ids": _tokens(LENGTH - 3, draw)} if both else {}
    if family in ("causal", "seq2seq"):
        more["use_cache"] = False
    if mode.mask == "left" and name in ("input_ids", "decoder_input_ids"):
        more["attention_mask"] = left_padded(LENGTH)
    return [given | more for given in held]


def _mains(name: str, config: Any, family: str, draw: torch.Generator) -> list[Tensor]:
    if family in ("causal", "masked", "seq2seq") or name.endswith("input_ids"):
        return [_tokens(LENGTH, draw)]
    if family == "vision":
        return _images(config, draw)
    waves = [torch.randn(BATCH, 1600, generator=draw)]
    return (waves if name != "input_features" else []) + _spectrograms(config, draw)


def left_padded(length: int) -> Tensor:
    """(BATCH, length): the last sequence begins with padding."""
    mask = torch.ones(BATCH, length, dtype=torch.long)
    mask[-1, :PADDING] = 0
    return mask


def _tokens(length: int, draw: torch.Generator) -> Tensor:
    return torch.randint(3, 100, (BATCH, length), generator=draw)


def _images(config: Any, draw: torch.Generator) -> list[Tensor]:
    """A film where the configuration counts frames, and an image."""
    sizes = [getattr(config, field, None) for field in ("image_size", "crop_size")]
    size = next((x for x in [*sizes, getattr(_part(config, "vision_config"), "image_size", None)] if x), 128)
    image = (
        getattr(config, "num_channels", 3) or 3,
        *(size if isinstance(size, tuple | list) else (size, size)),
    )
    counts = [getattr(config, field, None) for field in ("num_frames", "frames_per_clip")]
    shapes = [(frames, *image) for frames in counts if frames] + [image]
    return [torch.randn(BATCH, *shape, generator=draw) for shape in shapes]


def _part(config: Any, name: str) -> Any:
    return getattr(config, name, None)


#: Where a configuration says how many numbers a frame of a spectrogram has.
_BINS = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim")


def _spectrograms(config: Any, draw: torch.Generator) -> list[Tensor]:
    """By the configuration or its encoder's, bins before frames and behind them."""
    places = (config, _part(config, "encoder_config"), _part(config, "audio_config"))
    bins = [x for place in places for field in _BINS if isinstance(x := getattr(place, field, None), int)]
    frames = getattr(config, "max_length", None) or 2 * (getattr(config, "max_source_positions", None) or 32)
    found = []
    for width in dict.fromkeys([*bins, 80]):
        both = torch.randn(BATCH, width, frames, generator=draw)
        found += [both, both.mT.contiguous()]
    return found
