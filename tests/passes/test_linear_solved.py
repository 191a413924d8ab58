"""Matrices into which rows, or blocks, are written: which are solved for, and which only get something added."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor
from torch.nn import functional

B, H, D, SIDE = 2, 3, 8, 4
S = SIDE * SIDE + 1

#: q, k, v with a first token that has no place in the image, and a table for rows and one for columns.
INPUTS = (*torch.randn(3, B, H, S, D).unbind(), *torch.randn(2, SIDE, SIDE, D).unbind())


def relative(q: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    """The scores of places, (B, H, SIDE^2, SIDE^2): products of queries with tables."""
    image = q[:, :, 1:].reshape(B, H, SIDE, SIDE, D)
    rows = torch.einsum("bhyxc,ykc->bhyxk", image, of_rows)
    columns = torch.einsum("bhyxc,xkc->bhyxk", image, of_columns)
    return (rows[..., None] + columns[..., None, :]).reshape(B, H, S - 1, S - 1)


def written_into_a_block(q: Tensor, k: Tensor, v: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    scores = (q * D**-0.5) @ k.mT
    scores[:, :, 1:, 1:] = scores[:, :, 1:, 1:] + relative(q, of_rows, of_columns)
    return scores.softmax(-1) @ v


def added_to_a_block(q: Tensor, k: Tensor, v: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    scores = (q * D**-0.5) @ k.mT
    scores[:, :, 1:, 1:] += relative(q, of_rows, of_columns)
    return scores.softmax(-1) @ v


def added_with_a_margin(q: Tensor, k: Tensor, v: Tensor, of_rows: Tensor, of_columns: Tensor) -> Tensor:
    scores = (q * D**-0.5) @ k.mT
    return (scores + functional.pad(relative(q, of_rows, of_columns), (1, 0, 1, 0))).softmax(-1) @ v


@pytest.mark.parametrize("attend", [written_into_a_block, added_to_a_block, added_with_a_margin])
def test_positions_added_to_a_block_are_a_bias_and_no_delta_rule(attend: Callable[..., Tensor]) -> None:
    """MViT (arXiv:2112.01526) adds to the block of its image: products stand near, but no row enters one."""
    (site,) = check_like_eager(attend, INPUTS, differentiable=5).attention
    assert (site.family, site.verdict) == ("softmax", "rewritten")
    assert "bias" in site.spec


def test_a_row_that_is_multiplied_with_others_is_solved_for() -> None:
    """Even where something else is added to it as well."""

    def attend(q: Tensor, k: Tensor, v: Tensor, rate: Tensor) -> Tensor:
        rows = -((k * rate) @ k.mT).masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(), 0)
        for i in range(1, 4):
            row = rows[..., i, :i].clone()
            rows[..., i, :i] = (
                row + (row[..., None] * rows[..., :i, :i].clone()).sum(-2) + rate[..., :i, 0] * 0.1
            )
        return (q @ k.mT).tanh() @ (rows @ v).tanh()

    q, k, v = (torch.randn(2, 2, 4, 3) for _ in range(3))
    report = check_like_eager(attend, (q, k, v, torch.rand(2, 2, 4, 1)))
    assert any("delta rule" in site.reason for site in report.sites)
