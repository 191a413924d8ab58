"""Positions that enter otherwise than by a rotation are refused; what only moves rows to and fro is none."""

import pytest
import torch
from rope_cases import STREAMING
from torch import Tensor, nn

import attnopt


class Learned(nn.Module):
    """Attention without rotations over tokens to which something has been added, or which went through experts."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.tokens, self.places = nn.Embedding(20, 16), nn.Embedding(24, 16)
        self.heads = nn.Linear(16, 48)
        self.register_buffer("table", torch.randn(1, 24, 16))
        self.register_buffer("position_ids", torch.arange(40)[None], persistent=False)

    def added(self, ids: Tensor, x: Tensor) -> Tensor:
        n = ids.shape[1]
        t = torch.arange(n)
        match self.kind:
            case "embedding":
                return x + self.places(t)
            case "buffer":
                return x + self.places(self.position_ids[:, :n])
            case "counted":
                return x + self.places(torch.ones_like(ids).cumsum(1) - 1)
            case "slice":
                return x + self.places.weight[:n]
            case "whole":
                return x + self.table
            case "scaled rows":
                return x + (self.places.weight * 2)[t]
            case "waves":
                return x + torch.sin(t[:, None] / 10.0 ** (torch.arange(16) / 16))
            case "temperature":
                return x * (1 + (t[:, None] // 4))
        return x

    def experts(self, x: Tensor) -> Tensor:
        """Tokens are sorted by what they hold, and put back: rows are chosen, and no position is in them."""
        rows = x.flatten(0, 1)
        order = rows[:, 0].argsort()
        back = torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
        return torch.tanh(rows[order])[back].view_as(x)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.added(ids, self.tokens(ids))
        x = self.experts(x) if self.kind == "experts" else x
        q, k, v = self.heads(x).view(*ids.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
        if self.kind == "one head":  # taken by a number that the program holds, as in multi-query attention
            k, v = (part[:, torch.tensor([-1])].expand(-1, 2, -1, -1) for part in (k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def exact_and_reason(kind: str) -> tuple[bool, str]:
    ids = torch.randint(0, 20, (2, 24))
    _, report = attnopt.rewrite(torch.export.export(Learned(kind).eval(), (ids,)), STREAMING)
    (site,) = report.sites
    return site.exact, site.reason


@pytest.mark.parametrize(
    "kind", ["embedding", "buffer", "counted", "slice", "whole", "scaled rows", "waves", "temperature"]
)
def test_positions_that_are_added_or_multiplied_are_refused(kind: str) -> None:
    exact, reason = exact_and_reason(kind)
    assert exact
    assert "positions may enter its queries, keys or values otherwise" in reason


@pytest.mark.parametrize("kind", ["none", "experts", "one head"])
def test_no_positions_are_streamed(kind: str) -> None:
    assert exact_and_reason(kind) == (False, "")


class Two(Learned):
    """A second input of whole numbers: segments, or positions; nothing tells."""

    def forward(self, ids: Tensor, more: Tensor) -> Tensor:  # type: ignore[override]
        x = self.tokens(ids) + self.places(more)
        q, k, v = self.heads(x).view(*ids.shape, 3, 2, 8).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_a_second_input_of_whole_numbers_is_refused() -> None:
    ids = torch.randint(0, 20, (2, 24))
    _, report = attnopt.rewrite(torch.export.export(Two("none").eval(), (ids, ids.clone())), STREAMING)
    assert report.sites[0].exact
    assert "otherwise than by turning them, through" in report.sites[0].reason
