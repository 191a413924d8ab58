"""What benchmarks/sparq_quality.py measures: ways to attend at a given traffic, and tasks that show what they lose.

Traffic is counted in elements a step and key/value head, over that of dense attention, for n positions of D channels:

    dense    2 n D + 2 D                  keys and values are read, the new ones written
    SparQ    n r + 2 k D + 4 D            r channels of all keys, k rows of both; both key layouts and the mean value
    window   2 (sinks + window) D + 2 D   the first and the last positions alone

(arXiv 2312.04985, section 4, with the writes); n is the mean length over the decoded positions. At a traffic t the
rank is D (1 + 4 t) / 16, the best of a few on one window of *Emma*, and k takes the rest: at 1/4 that is D / 8, and
six channels of 64 at 1/8. Fewer channels and more positions lose less here, until there are too few to choose by.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from attnopt.caches import Rotary
from attnopt.kernels.sparq.rows import sparq_rows

#: Share of topk that goes to the last positions, as in the paper.
LOCAL = 0.25
SINKS = 4


@dataclass(frozen=True)
class Dense:
    """All of the keys."""

    name: str = "dense"
    traffic: float = 1.0

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        """q (B, H, N, D), k and v (B, Hkv, N, D), rotated, to (B, H, N, D); rows before `first` are the prompt."""
        del first
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@dataclass(frozen=True)
class Sparq:
    """`rank` channels of all keys, `topk` positions."""

    rank: int
    topk: int
    traffic: float
    name: str = "sparq"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        """As Dense.attend."""
        local = int(LOCAL * self.topk)
        return sparq_rows(q, k, v, rank=self.rank, topk=self.topk, local=local, first=first)


@dataclass(frozen=True)
class Window:
    """The first SINKS keys and the last `window`, at their true positions."""

    window: int
    traffic: float
    name: str = "window"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, first: int) -> Tensor:
        """As Dense.attend."""
        prompt, rest = q[:, :, :first], q[:, :, first:]
        at = torch.arange(k.shape[2], device=q.device)
        back = at[first:, None] - at
        seen = (back >= 0) & ((back < self.window) | (at < SINKS))
        before = [x[:, :, :first] for x in (k, v)]
        return torch.cat(
            [
                functional.scaled_dot_product_attention(prompt, *before, is_causal=True, enable_gqa=True),
                functional.scaled_dot_product_attention(rest, k, v, attn_mask=seen, enable_gqa=True),
            ],
            dim=2,
        )


Method = Dense | Sparq | Window


def sparq_at(traffic: float, n: float, d: int) -> Sparq:
    """The largest topk that stays within the traffic at length n, beside the rank that the first lines name."""
    rank = max(1, round(d * (1 + 4 * traffic) / 16))
    topk = int((traffic * (2 * n * d + 2 * d) - n * rank - 4 * d) / (2 * d))
    return Sparq(rank, topk, (n * rank + 2 * topk * d + 4 * d) / (2 * n * d + 2 * d))


def window_at(traffic: float, n: float, d: int) -> Window:
    """The widest window that stays within the traffic at length n."""
    window = int((traffic * (2 * n * d + 2 * d) - 2 * d) / (2 * d)) - SINKS
    return Window(window, (2 * (window + SINKS) * d + 2 * d) / (2 * n * d + 2 * d))


@dataclass(frozen=True)
class Rotating:
    """A method as an attention function of `_smollm2_gpu`, which is given queries and keys before rotation."""

    method: Method
    rotary: Rotary
    first: int

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        del layer
        at = torch.arange(q.shape[2], device=q.device)[None]
        q, k = self.rotary.turned(q, at), self.rotary.turned(k, at)
        return self.method.attend(q, k, v, self.first)


@dataclass(frozen=True, eq=False)
class Trial:
    """Token ids (B, N); from position `first` on they are decoded; those from `asked` on are what should come."""

    ids: Tensor
    first: int
    asked: int


# Tasks. A text is a stretch of a novel, (N,) int64 on the CPU.


def reading(text: Tensor, context: int) -> Iterator[Trial]:
    """Windows of `context` tokens one behind the other; the last quarter of each is decoded."""
    first = context * 3 // 4
    for start in range(0, len(text) - context + 1, context - first):
        yield Trial(text[start : start + context][None], first, first)


CUE, COPIED = 32, 96


def copying(text: Tensor, context: int, seed: int) -> Trial:
    """Words in no order, hidden in a text, and at the end once more: after CUE of them the COPIED others should come.

    They are drawn from the text one by one, so that nothing but the first time they were said tells what follows.
    """
    length = context - CUE - COPIED
    generator = torch.Generator().manual_seed(seed)
    begin = int(torch.randint(0, max(1, len(text) - length), (), generator=generator))
    words = text[torch.randint(0, len(text), (CUE + COPIED,), generator=generator)]
    at = int(torch.randint(0, length - len(words), (), generator=generator))
    body = text[begin : begin + length].clone()
    body[at : at + len(words)] = words
    return Trial(torch.cat([body, words])[None], length, length + CUE)


#: In SmolLM2's tokens: "\n\nThe secret number of", a city, " is", " " and a digit each, ". Keep it in mind.\n\n".
SAID, IS, SPACE, DIGIT = (198, 198, 504, 4911, 1230, 282), 314, 216, 32
KEEP = (30, 5545, 357, 281, 1945, 30, 1116)
CITIES = (
    4528,
    7042,
    7268,
    11452,
    28030,
    18252,
    31567,
    22231,
    41730,
    18793,
    42944,
    15651,
    29017,
    19081,
    17338,
)
DIGITS, NEEDLES = 5, 4


def needles(text: Tensor, context: int, seed: int) -> Trial:
    """NEEDLES cities with a secret number each, at even depths of a text; last, one of the numbers is asked for."""
    generator = torch.Generator().manual_seed(seed)
    cities = torch.tensor(CITIES)[torch.randperm(len(CITIES), generator=generator)[:NEEDLES]].tolist()
    numbers = torch.randint(0, 10, (NEEDLES, DIGITS), generator=generator) + DIGIT
    said = [
        torch.tensor([*SAID, city, IS, SPACE, *number, *KEEP])
        for city, number in zip(cities, numbers.tolist(), strict=True)
    ]
    asked = int(torch.randint(0, NEEDLES, (), generator=generator))
    question = torch.tensor([*SAID, cities[asked], IS, SPACE])
    length = context - sum(map(len, said)) - len(question) - DIGITS
    begin = int(torch.randint(0, max(1, len(text) - length), (), generator=generator))
    pieces = text[begin : begin + length].tensor_split(NEEDLES + 1)
    hay = [part for pair in zip(pieces, said, strict=False) for part in pair] + [pieces[-1]]
    ids = torch.cat([*hay, question, numbers[asked]])
    return Trial(ids[None], len(ids) - DIGITS - len(question), len(ids) - DIGITS)


# Scores of what a model says about the decoded positions.


def loss(logits: Tensor, trial: Trial) -> Tensor:
    """(N - asked,): nats for each token from `asked` on; logits (1, N - first + 1, V) from position first - 1 on."""
    wanted = trial.ids[0, trial.asked :].to(logits.device)
    said = logits[0, trial.asked - trial.first : -1]
    return functional.cross_entropy(said.float(), wanted, reduction="none")


def right(logits: Tensor, trial: Trial) -> Tensor:
    """(N - asked,) bool: which tokens from `asked` on are the likeliest, each after the right ones before it.

    Greedy decoding gets as many right as there are before the first that is not: up to there it has seen the same.
    """
    wanted = trial.ids[0, trial.asked :].to(logits.device)
    return logits[0, trial.asked - trial.first : -1].argmax(-1) == wanted
