"""What `attnopt tune` does, apart from flags: load, measure, write."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from attnopt import cli_work, files
from attnopt.cli_flags import Output
from attnopt.cli_tune import Plan, Tuned, tune
from attnopt.cli_tune_plot import render
from attnopt.cli_tune_text import share, token_ids
from attnopt.errors import MissingError, OptionError, SourceError


@dataclass(frozen=True, slots=True)
class Asked:
    """What the user named: the model, the text with its tokenizer, where to run, and the files to write."""

    source: str
    text: Path
    tokens: int
    tokenizer: str | None
    device: str
    out: Path | None
    plot: Path | None
    force: bool

    @property
    def where(self) -> torch.device:
        """The device. Raises OptionError for an unknown one, MissingError where it is not there."""
        if self.device not in {"auto", "cpu", "cuda"}:
            raise OptionError(f"--device {self.device}: wanted auto, cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise MissingError("--device cuda, and torch finds no CUDA device")
        found = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(found if self.device == "auto" else self.device)


def run(
    asked: Asked, limit: str, prompt: int | None, ranks: Sequence[int], topks: Sequence[int], output: Output
) -> Tuned:
    """Measures, and writes what was asked for; the choice only if there is one."""
    plan = Plan(share(limit), tuple(ranks), tuple(topks), prompt)
    device = asked.where
    for path in (asked.out, asked.plot):
        if path:
            files.check_writable(path, force=asked.force, inputs=(asked.text,))
    loaded = cli_work.load(asked.source, None, output, allow_unsafe=False)
    if not isinstance(loaded.model, nn.Module):
        raise SourceError(
            f"{asked.source} was exported, for texts of one length; wanted a factory, or a Hugging Face folder"
        )
    ids = token_ids(asked.text, asked.tokens, asked.tokenizer, asked.source).to(device)
    found = tune(loaded.model.to(device).eval(), ids, plan, output.note)
    if asked.out and found.chosen:
        _write(asked.out, found.to_json(), asked, output)
    if asked.plot:
        _write(asked.plot, render(found), asked, output)
    return found


def _write(path: Path, text: str, asked: Asked, output: Output) -> None:
    with files.atomic(path, force=asked.force, inputs=(asked.text,)) as stream:
        stream.write(text.encode())
    output.note(f"wrote {path}")
