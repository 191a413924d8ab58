"""Tests of SparQ's Triton path share these: its steps one by one, and how an answer is judged."""

from dataclasses import replace

import pytest
import torch
from oracle import assert_same
from sparq_cases import answer, kept_rows, yardstick
from torch import Tensor

from attnopt.kernels.sparq.request import Request
from attnopt.kernels.sparq.tiles import Tiles
from attnopt.kernels.sparq.triton_decode import choose, score_positions, served
from attnopt.kernels.sparq.triton_score import Scores
from attnopt.kernels.sparq.triton_select import Chosen, Weights
from attnopt.kernels.sparq.triton_start import choose_channels

#: Where the kernels run, and in what. The interpreter's bf16 arithmetic is wrong, so bf16 needs a GPU.
PLACES = [
    pytest.param("cuda", torch.bfloat16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float16, marks=pytest.mark.gpu),
    pytest.param("cuda", torch.float32, marks=pytest.mark.gpu),
]
if not torch.cuda.is_available():
    PLACES += [("cpu", torch.float16), ("cpu", torch.float32)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

#: Small enough to interpret, and several splits, parts and tiles to every axis of the cases.
SMALL = Tiles(block=16, split=32, row_block=16, weight_block=32, run=16, chosen_block=16, chosen_split=16)
#: The same with the tensor cores for every group.
DOTS = replace(SMALL, dot_heads=1)


def scored(request: Request, tiles: Tiles = SMALL) -> tuple[Scores, Weights]:
    return score_positions(request, choose_channels(request), replace(tiles, early=False))


def choice_of(request: Request, tiles: Tiles = SMALL) -> Chosen:
    request, tiles = served(request, tiles), replace(tiles, early=False)
    return choose(request, scored(request, tiles)[1], tiles)


def positions_of(request: Request, tiles: Tiles = SMALL) -> Tensor | None:
    """(P, topk); where fewer are kept than topk, padded ones stand for those that are missing."""
    if request.is_exact:
        return None
    chosen = choice_of(request, tiles).positions.cpu().clone()
    for row, mine in zip(
        kept_rows(request.masked()).repeat_interleave(request.k.shape[1], 0), chosen, strict=True
    ):
        missing = int((mine < 0).sum())
        assert (mine[len(mine) - missing :] < 0).all()
        mine[len(mine) - missing :] = (~row).nonzero().flatten()[:missing]
    return chosen


def by_head(request: Request, positions: Tensor | None) -> Tensor | None:
    return None if positions is None else positions.cpu().view(*request.k.shape[:2], -1)


def probabilities(request: Request, scores: Scores) -> Tensor:
    """(B, Hkv, G, Sk) from the base-2 logits and the parts of their softmax."""
    top = scores.part_max.amax(1, keepdim=True).nan_to_num(neginf=0.0)
    total = (scores.part_sum * (scores.part_max - top).exp2()).sum(1)
    weights = (scores.logits - top[:, 0, :, None]).exp2() / total.where(total > 0, 1.0)[..., None]
    return weights.view(*request.k.shape[:2], request.group, -1)


def assert_row_rule(request: Request, out: Tensor, positions: Tensor | None, dtype: torch.dtype) -> None:
    where = by_head(request, positions)
    request = request if positions is not None else replace(request, mean_value=False)
    assert_same(out, answer(request, where, torch.float64), yardstick(request, where, dtype))
