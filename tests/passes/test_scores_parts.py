"""Position terms that are laid beside the scores and summed with them, and sums that only look so."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

B, H, N = 2, 3, 7
Q, K, V = torch.randn(3, B, H, N, 4).unbind()
R = torch.randn(B, H, N, N)
#: Sizes that a model fixes; the batch and the length are symbolic.
FIXED = frozenset({H, 4})
Gather = Callable[[Tensor, Tensor], Tensor]


def over(gather: Gather) -> Callable[..., Tensor]:
    """Softmax attention over what `gather` makes of the scores and a position term."""

    def attend(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        return gather(q @ k.transpose(-2, -1), r).softmax(-1) @ v

    return attend


def beside(*parts: Tensor, dim: int = 1) -> Tensor:
    """cat along `dim`, which then counts the parts first."""
    return torch.cat(parts, dim).unflatten(dim, (len(parts), -1))


SUMS: list[tuple[Gather, int]] = [
    (lambda s, r: torch.cat([s, r], 1).view(s.shape[0], 2, H, *s.shape[2:]).sum(1), 1),
    (lambda s, r: torch.cat([r, s], 1).view(s.shape[0], 2, H, *s.shape[2:]).sum(dim=1), 1),
    (lambda s, r: beside(s, r, r * 0.5).sum(1), 2),
    (lambda s, r: torch.stack([s, r]).sum(0), 1),
    (lambda s, r: torch.stack([s, r], -1).sum(-1), 1),
    (lambda s, r: torch.stack([s, r], 2).sum(2, keepdim=True).squeeze(2), 1),
    (lambda s, r: torch.stack([s, r], 1).transpose(1, 2).sum(2) * 0.5, 1),
    (lambda s, r: beside(s, r, dim=2).sum(2), 1),
    (lambda s, r: torch.stack([s, r], 1).flatten(0, 1).unflatten(0, (-1, 2)).sum(1), 1),
    (lambda s, r: torch.stack([s + r, r]).sum(0), 2),
]


@pytest.mark.parametrize(("gather", "biases"), SUMS)
def test_parts_that_are_summed_are_biases(gather: Gather, biases: int) -> None:
    (site,) = check_like_eager(over(gather), (Q, K, V, R), differentiable=4).attention
    assert site.verdict == "rewritten", site.reason
    assert site.spec.endswith({1: "full bias", 2: "full bias x2"}[biases]), site.spec


@pytest.mark.parametrize("gather", [gather for gather, _ in SUMS[:7]])
def test_parts_are_told_where_sizes_are_symbolic(gather: Gather) -> None:
    (site,) = check_like_eager(over(gather), (Q, K, V, R), dynamic=None, fixed=FIXED).attention
    assert site.verdict == "rewritten", site.reason


def test_products_of_queries_become_features() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, p: Tensor) -> Tensor:
        return torch.stack([q @ k.mT, q @ p.mT]).sum(0).softmax(-1) @ v

    (site,) = check_like_eager(attend, (Q, K, V, torch.randn(B, H, N, 4)), differentiable=4).attention
    assert (site.verdict, "bias" in site.spec) == ("rewritten", False), site.reason


@pytest.mark.parametrize(
    "gather",
    [
        # The summed axis runs along heads, or along what else is not the count of parts.
        lambda s, r: torch.cat([s, r], 1).view(B, H, 2, N, N).sum(2),
        lambda s, r: torch.cat([s, r], 1).view(B, H, N, 2, N).sum(3),
        lambda s, r: torch.cat([s, r], -1).unflatten(-1, (N, 2)).sum(-1),
        lambda s, r: torch.stack([s, r], 1).view(B, H, 2, N, N).sum(2),
        lambda s, r: torch.stack([s, r], 1).transpose(1, 2).reshape(B, 2, H, N, N).sum(1),
        # Unequal parts, of which some lie across the border.
        lambda s, r: torch.cat([s, r[:, :1], r[:, :2]], 1).view(B, 2, H, N, N).sum(1),
        lambda s, r: torch.cat([s[:, :1], s[:, 1:], r], 1).view(B, 2, H, N, N).sum(1),
        # Other reductions.
        lambda s, r: torch.stack([s, r]).mean(0),
        lambda s, r: torch.stack([s, r]).prod(0),
        lambda s, r: torch.stack([s, r]).sum((0, 1)).unsqueeze(0).expand_as(s),
        lambda s, r: torch.stack([s, r]).abs().sum(0),
        # More parts than are read, and the scores several times.
        lambda s, r: torch.stack([s, r, r, r, r]).sum(0),
        lambda s, r: torch.stack([s, s]).sum(0),
        lambda s, r: torch.stack([s, s * r]).sum(0),
        # What is laid beside is written to later, or needed otherwise.
        lambda s, r: torch.stack([s, r]).mul_(0.5).sum(0),
        lambda s, r: torch.stack([s, r]).sum(0) + torch.stack([s, r]).amax(0),
        lambda s, r: torch.stack([s, r]).cumsum(0)[1],
    ],
)
def test_other_sums_compute_what_eager_computes(gather: Gather) -> None:
    check_like_eager(over(gather), (Q, K, V, R), differentiable=4)


def test_a_part_written_to_after_it_was_laid_beside_counts_as_it_was() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        positions = r * 2
        both = torch.stack([q @ k.mT, positions])
        positions.add_(1.0).mul_(r)
        return both.sum(0).softmax(-1) @ v + positions @ v

    check_like_eager(attend, (Q, K, V, R), differentiable=4)


def test_a_mask_among_the_parts_hides() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.full((N, N), -torch.inf, dtype=q.dtype).triu(1).expand(B, H, N, N)
        return torch.stack([q @ k.mT, hidden]).sum(0).softmax(-1) @ v

    (site,) = check_like_eager(attend, (Q, K, V), differentiable=3).attention
    assert (site.verdict, "causal" in site.spec) == ("rewritten", True), site.spec
