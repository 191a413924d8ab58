"""Regions: where a loop begins and ends, what enters it, and what is no loop at all."""

import pytest
import torch
from graphs import shadow_of
from loop_spellings import B, D, E, H, S, blocks, blocks_with_state, by_head, slopes, tokens
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - its usual name

from attnopt.passes import reroll_cut
from attnopt.passes.reroll import candidates, regions
from attnopt.passes.reroll_cut import Region
from attnopt.rule import Reject


def region_of(function: object, *inputs: Tensor) -> Region:
    """The likeliest region of the one candidate."""
    shadow = shadow_of(function, *inputs)  # type: ignore[arg-type]
    (candidate,) = candidates(shadow)
    return regions(shadow, candidate)[0]


def test_what_enters_a_loop_are_whole_sequences_and_decays() -> None:
    region = region_of(lambda q, k, v, s: blocks(q.tanh(), k * 2, v, s), *by_head(), slopes())
    shapes = sorted(tuple(leaf.meta["val"].shape) for leaf in region.leaves)
    assert shapes == sorted([(H, 1, 1), (B, H, S, D), (B, H, S, D), (B, H, S, E)])
    assert region.root.target is torch.ops.aten.cat.default


def test_a_region_ends_with_the_memory_that_the_loop_writes_to() -> None:
    region = region_of(tokens, torch.randn(B, S, H, D), torch.randn(B, S, H, D), torch.randn(B, S, H, E))
    assert region.root.target is torch.ops.aten.new_zeros.default
    assert sum(node.target is torch.ops.aten.copy_.default for node in region.nodes) == S


def test_the_last_state_is_found_where_it_is_used() -> None:
    region = region_of(blocks_with_state, *by_head(), slopes())
    assert region.state is not None
    assert tuple(region.state.meta["val"].shape) == (B, H, D, E)


def test_softmax_attention_and_norms_are_no_candidates() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = (q @ k.mT * 0.5).softmax(-1) @ v
        return F.layer_norm(out, out.shape[-1:]) * out.pow(2).mean(-1, keepdim=True).rsqrt()

    assert list(candidates(shadow_of(attend, *by_head()))) == []


def test_a_loop_beyond_the_budget_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reroll_cut, "BUDGET", 20)
    shadow = shadow_of(blocks, *by_head(), slopes())
    (candidate,) = candidates(shadow)
    with pytest.raises(Reject, match="operations is not read"):
        regions(shadow, candidate)
