"""What a rewrite costs on a text: the perplexity before and after, and how far the logits are apart."""

from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from attnopt.cli_sources import Source
from attnopt.cli_tune_text import token_ids
from attnopt.errors import Blame, SourceError

#: A text is read in pieces as long as the example input; so many runs of both programs at most.
RUNS = 32


@dataclass(frozen=True, slots=True)
class Evaluation:
    """perplexity_before, perplexity_after: exp of the mean loss of all next tokens within the pieces of the text.

    logits_error: ||after - before|| / ||before|| over all logits. tokens: how many were predicted. length: tokens in a
    piece. tokenizer: how the text became tokens.
    """

    text: str
    tokenizer: str
    tokens: int
    length: int
    perplexity_before: float
    perplexity_after: float
    logits_error: float

    def as_dict(self) -> dict[str, str | float]:
        """For the report."""
        return {**asdict(self), "perplexity_change": self.perplexity_after / self.perplexity_before - 1}


@dataclass(slots=True)
class _Sums:
    """Running sums over pieces."""

    before: float = 0.0
    after: float = 0.0
    tokens: int = 0
    apart: float = 0.0
    size: float = 0.0

    def add(self, ids: Tensor, before: Tensor, after: Tensor) -> None:
        self.before += _loss(before, ids)
        self.after += _loss(after, ids)
        self.tokens += ids[:, 1:].numel()
        self.apart += float((after.double() - before.double()).square().sum())
        self.size += float(before.double().square().sum())


def evaluate(
    text: Path, named: str, source: Source, before: ExportedProgram, after: ExportedProgram
) -> Evaluation:
    """Both programs on a text. named: SOURCE as the user wrote it, beside which a tokenizer may lie.

    Raises SourceError where there is no text, it is too short, or the model is none that predicts tokens from tokens.
    """
    example = _example(source)
    old, new = before.module(), after.module()
    with torch.no_grad(), Blame("running the model on its example input"):
        vocabulary = _logits(_call(old, source, example), example).shape[-1]
    ids, tokenizer = _ids(text, named, vocabulary)
    batch, length = example.shape
    runs = min(RUNS, ids.numel() // (batch * length))
    if not runs or length < 2:
        raise SourceError(
            f"{text} has {ids.numel()} tokens; wanted {batch} x {length}, as the example input, or more"
        )
    sums = _Sums()
    with torch.no_grad(), Blame(f"running both programs on {text}"):
        for piece in ids[: runs * batch * length].view(runs, batch, length).to(example.dtype):
            sums.add(piece, *(_logits(_call(model, source, piece), piece) for model in (old, new)))
    return Evaluation(
        str(text), tokenizer, sums.tokens, length, exp(sums.before / sums.tokens), exp(sums.after / sums.tokens),
        (sums.apart / max(sums.size, 1e-300)) ** 0.5,
    )  # fmt: skip


def _example(source: Source) -> Tensor:
    """The one input, of token ids."""
    inputs = pytree.tree_leaves((source.args, dict(source.kwargs)))
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if len(tensors) != 1 or tensors[0].dim() != 2 or tensors[0].dtype not in {torch.int64, torch.int32}:
        found = ", ".join(f"{x.dtype} {tuple(x.shape)}" for x in tensors) or "none"
        raise SourceError(
            f"--evaluate wants a language model with one input, token ids (B, N); its inputs are {found}"
        )
    return tensors[0]


def _call(model: nn.Module, source: Source, ids: Tensor) -> Any:
    args, kwargs = pytree.tree_map(
        lambda x: ids if isinstance(x, Tensor) else x, (source.args, dict(source.kwargs))
    )
    return model(*args, **kwargs)


def _logits(made: Any, ids: Tensor) -> Tensor:
    for x in pytree.tree_leaves(made):
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3 and x.shape[:2] == ids.shape:
            return x
    raise SourceError(f"--evaluate wants logits {(*ids.shape, 'vocabulary')} from the model; it returns none")


def _ids(text: Path, named: str, vocabulary: int) -> tuple[Tensor, str]:
    """(N,) int64, and how they were made: by the tokenizer that SOURCE comes with; else bytes modulo the vocabulary."""
    if not text.is_file():
        raise SourceError(f"{text}: no such file; wanted a text, or a .json file with a list of token ids")
    if text.suffix == ".json":
        return token_ids(text, RUNS**5, None, named)[0] % vocabulary, "token ids of the file"
    folder = Path(named) if Path(named).is_dir() else Path(named).parent
    if Path(named).exists() and any(folder.glob("tokenizer*")) and not named.endswith(".pt2"):
        return token_ids(text, RUNS**5, str(folder), named)[0] % vocabulary, f"tokenizer of {folder}"
    return torch.tensor(list(text.read_bytes())) % vocabulary, f"bytes modulo {vocabulary}"


def _loss(logits: Tensor, ids: Tensor) -> float:
    scores = logits[:, :-1].float().log_softmax(-1)
    return -float(scores.gather(-1, ids[:, 1:, None].long()).double().sum())
