"""What one tensor of the graph states of a mask is not read from a second one, of which that one is made."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

Q, K, V = (torch.randn(2, 4, n, 16, generator=torch.Generator().manual_seed(n)) for n in (7, 9, 9))
EARLIER = torch.tensor([[False, True, True, False, True, True, True, False], [True] * 8])
OWN = torch.tensor([[True], [False]])
Hiding = Callable[[Tensor, Tensor], Tensor]


def causal() -> Tensor:
    return torch.ones(7, 9, dtype=torch.bool).tril(2)


def attend(keep: Hiding) -> Callable[..., Tensor]:
    def function(q: Tensor, k: Tensor, v: Tensor, earlier: Tensor, own: Tensor) -> Tensor:
        return (q @ k.mT * 0.25).masked_fill(~keep(earlier, own), -torch.inf).softmax(-1) @ v

    return function


def joined(earlier: Tensor, own: Tensor) -> Tensor:
    return torch.cat([earlier, own], 1)[:, None, None]


PADDING: dict[str, Hiding] = {
    "of a single key last": joined,
    "of a single key first": lambda a, b: torch.cat([b, a], 1)[:, None, None],
    "as numbers": lambda a, b: torch.cat([a.float(), b.float()], 1)[:, None, None].bool(),
    "as whole numbers": lambda a, b: torch.cat([a.long(), b.long()], 1)[:, None, None] != 0,
    "turned round": lambda a, b: ~torch.cat([~a, ~b], 1)[:, None, None],
    "in three parts": lambda a, b: torch.cat([a[:, :1], b, a[:, 1:]], 1)[:, None, None],
    "in two single parts": lambda a, b: torch.cat([a[:, 1:], b, ~b], 1)[:, None, None],
}


@pytest.mark.parametrize(("differentiable", "dynamic"), [(0, False), (3, False), (0, True)])
@pytest.mark.parametrize("name", PADDING)
def test_parts_of_a_padding_are_one_padding(name: str, differentiable: int, dynamic: bool) -> None:
    """fairseq's `_append_prev_key_padding_mask` joins the earlier keys' mask with that of the one new key."""
    inputs = (Q, K, V, EARLIER, OWN)
    report = check_like_eager(attend(PADDING[name]), inputs, differentiable=differentiable, dynamic=dynamic)
    (site,) = report.sites
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=0.25 padding empty=nan"), site.reason


BESIDE: dict[str, Hiding] = {
    "causality": lambda a, b: joined(a, b) & causal(),
    "a first key": lambda a, b: joined(a, b) | (torch.arange(9) < 1),
    "one key's own mask": lambda a, b: joined(a, b) & b[:, None, None],
    "one key's own mask before": lambda a, b: b[:, None, None] & joined(a, b),
    "the other way round": lambda a, b: ~joined(a, b),
    "for some queries": lambda a, b: joined(a, b) | (torch.arange(7)[:, None] < 3),
    "moved": lambda a, b: joined(a, b).roll(1, -1),
    "parts changed places": lambda a, b: torch.cat([b, a], 1)[:, None, None] & causal(),
}


@pytest.mark.parametrize("differentiable", [0, 3])
@pytest.mark.parametrize("name", BESIDE)
def test_what_stands_beside_it_counts(name: str, differentiable: int) -> None:
    """`check_like_eager` compares; nothing is called a misreading, either."""
    report = check_like_eager(attend(BESIDE[name]), (Q, K, V, EARLIER, OWN), differentiable=differentiable)
    (site,) = report.sites
    assert site.verdict == "rewritten", site.reason
