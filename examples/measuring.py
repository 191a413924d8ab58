"""What the examples measure of a language model: logits, a greedy continuation, perplexity, errors of rows, seconds.

A model here is anything that takes token ids (1, S), int64, to logits (1, S, vocabulary).
"""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

LanguageModel = Callable[[Tensor], Tensor]
Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True)
class Answers:
    """What a model says to a text.

    logits: (S, vocabulary). continuation: the token ids that follow the prompt. seconds: of one forward pass over
    the text, and of the whole continuation.
    """

    logits: Tensor
    continuation: list[int]
    forward_seconds: float
    continuation_seconds: float


@torch.inference_mode()
def answers(
    model: LanguageModel, ids: Tensor, *, prompt: int, count: int, progress: Progress = iter
) -> Answers:
    """Runs the model over ids (1, S) twice, and then `count` times to continue the first `prompt` of them."""
    timed = [_timed(lambda: model(ids)) for _ in range(2)]
    start = time.perf_counter()
    continued = greedy(model, ids[:, :prompt], count, progress)
    return Answers(
        logits=timed[-1][1][0],
        continuation=continued,
        forward_seconds=min(seconds for seconds, _ in timed),
        continuation_seconds=time.perf_counter() - start,
    )


def greedy(model: LanguageModel, ids: Tensor, count: int, progress: Progress = iter) -> list[int]:
    """The `count` likeliest tokens after ids (1, S), one after the other; no cache, so the lengths grow."""
    start = ids.shape[1]
    for _ in progress(range(count)):
        following = model(ids)[:, -1:].argmax(dim=-1)
        ids = torch.cat([ids, following], dim=1)
    continued: list[int] = ids[0, start:].tolist()
    return continued


def perplexity(logits: Tensor, ids: Tensor) -> float:
    """exp of the mean loss of each token given those before it; logits (S, vocabulary), ids (1, S)."""
    return float(F.cross_entropy(logits[:-1].double(), ids[0, 1:]).exp())


def row_errors(logits: Tensor, exact: Tensor) -> Tensor:
    """||logits - exact|| / ||exact|| for each row: (S, vocabulary) twice to (S,), fp64."""
    pairs = zip(logits.split(256), exact.split(256), strict=True)  # in pieces: a vocabulary is wide
    return torch.cat([(piece.double() - want).norm(dim=-1) / want.norm(dim=-1) for piece, want in pairs])


@torch.inference_mode()
def exact_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits (S, vocabulary) that the model stands for, in fp64, where the graph asks for fp32 too.

    The rotary angles stay as the model computes them (their buffers stay fp32): they are data to both sides of a
    comparison, and their own error at late positions would hide what is compared.
    """
    exact = copy.deepcopy(model)
    for parameter in exact.parameters():
        parameter.data = parameter.data.double()
    with _Fp64():
        logits: Tensor = exact(ids)[0]
    return logits


class _Fp64(TorchFunctionMode):
    """Takes a request to bring fp64 down to fp32 as one for fp64 (norms and softmax in a model like to ask for it)."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        _types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> Any:
        given = (args, kwargs or {})
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_leaves(given)):
            given = tree_map(lambda x: torch.float64 if x is torch.float32 else x, given)
        return func(*given[0], **given[1])


def _timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result
