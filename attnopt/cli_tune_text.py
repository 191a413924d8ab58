"""The text that `attnopt tune` reads: as token ids, or as text with the tokenizer that the model comes with."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnopt.cli_hf import tokenizer_of
from attnopt.cli_sources import function_of
from attnopt.errors import Blame, OptionError, SourceError


def token_ids(text: Path, tokens: int, tokenizer: str | None, source: str) -> Tensor:
    """The first `tokens` tokens of a file, (1, N) int64: a .json file with a list of ids, or text.

    tokenizer: a Hugging Face folder, or file.py:function that returns a tokenizer; by default what SOURCE has: its
    folder, or a function `tokenizer` beside the factory. Raises SourceError where a file or a tokenizer is missing.
    """
    if not text.is_file():
        raise SourceError(f"{text}: no such file; wanted a text, or a .json file with a list of token ids")
    if text.suffix == ".json":
        return _listed(text)[:, :tokens]
    encode = _tokenizer(tokenizer or _beside(source))
    with Blame(f"tokenizing {text}", "-v shows the traceback"):
        made = encode(text.read_text(encoding="utf-8"))
    ids = made["input_ids"] if hasattr(made, "keys") else made
    return torch.tensor([list(ids)[:tokens]], dtype=torch.int64)


def _listed(path: Path) -> Tensor:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path} is not JSON ({error}); wanted a list of token ids") from error
    if not isinstance(held, list) or not held or not all(type(n) is int for n in held):
        raise SourceError(f"{path} holds something else than token ids; wanted a list of whole numbers")
    return torch.tensor([held], dtype=torch.int64)


def _beside(source: str) -> str:
    """Where SOURCE keeps its tokenizer."""
    path = Path(source)
    if path.is_dir() or path.name == "config.json":
        return str(path if path.is_dir() else path.parent)
    return f"{source.rpartition(':')[0]}:tokenizer"


def _tokenizer(where: str) -> Any:
    folder = Path(where)
    if folder.is_dir():
        return tokenizer_of(folder)
    try:
        make = function_of(where)
    except SourceError as error:
        raise SourceError(f"no tokenizer: {error}; say --tokenizer, or give token ids as .json") from error
    with Blame(f"calling {where}", "-v shows its traceback"):
        return make()


def share(text: str) -> float:
    """`1%` or `0.01` as a number from 0; OptionError for anything else."""
    number, is_percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        value = float(number) / (100 if is_percent else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise OptionError(f"--max-ppl-increase {text}: wanted a share from 0, such as 1% or 0.01")
    return value
