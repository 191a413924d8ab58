"""Loops in which one detail is not that of linear attention: left alone, and computed as eager computes them."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import shadow_of
from loop_spellings import B, C, D, E, H, S, by_head, gates, running_sums, slopes
from torch import Tensor

from attnopt.passes.reroll import candidates, regions
from attnopt.report import Report

Attend = Callable[..., Tensor]


def assert_no_loop_is_rewritten(report: Report) -> None:
    """A product inside of it may be; the outputs have been compared."""
    rewritten = [site for site in report.attention if site.verdict == "rewritten"]
    assert all(site.nearest_rule != "linear loop" for site in rewritten)
    assert all(site.reason for site in report.attention if site.verdict != "rewritten")


def block_loop(
    *,
    fade: int = 0,
    shift: int = 0,
    reads: int | None = None,
    drops: int | None = None,
    order: tuple[int, ...] = (0, 1, 2),
    last: Callable[[Tensor], Tensor] = lambda x: x,
) -> Attend:
    """Lightning Attention by blocks, with one block or one detail changed.

    fade: the state of block 1 fades by that many steps more. shift: where block 1 takes its keys from. reads: the block
    whose queries block 1 takes. drops: the block whose state is forgotten. order: of the blocks in the output. last:
    what is done to the last block's scores.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        rows, state = [], q.new_zeros(B, H, D, E)
        place = torch.arange(1, C + 1, dtype=q.dtype)
        apart = place[:, None] - place[None, :]
        decay = torch.where(apart >= 0, torch.exp(-slope * apart.clamp_min(0)), 0.0)
        for n in range(S // C):
            one = n == 1
            now = slice(n * C, (n + 1) * C)
            keys = slice(n * C - shift, (n + 1) * C - shift) if one else now
            query = q[:, :, slice(reads * C, (reads + 1) * C)] if one and reads is not None else q[:, :, now]
            scores = query @ k[:, :, keys].mT * decay
            scores = last(scores) if n == S // C - 1 else scores
            rows.append(scores @ v[:, :, now] + (query * torch.exp(-slope * place[:, None])) @ state)
            fading = k[:, :, keys] * torch.exp(-slope * (C - place[:, None]))
            state = state * torch.exp(-slope * (C + (fade if one else 0))) + fading.mT @ v[:, :, now]
            state = state * 0 if drops == n else state
        return torch.cat([rows[n] for n in order], 2)

    return attend


NEAR_MISSES = {
    "one block fades by one step more": block_loop(fade=1),
    "one block reads keys one position early": block_loop(shift=1),
    "one block reads the queries of another": block_loop(reads=0),
    "the state is not handed on": block_loop(drops=0),
    "blocks in another order": block_loop(order=(1, 0, 2)),
    "one block twice": block_loop(order=(0, 1, 1)),
    "the last block's scores squared": block_loop(last=lambda x: x * x),
    "the last block's scores clamped": block_loop(last=lambda x: x.clamp_min(0)),
    "the last block's scores halved": block_loop(last=lambda x: x * 0.5),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_loop_that_is_no_linear_attention_stays(name: str) -> None:
    report = check_like_eager(NEAR_MISSES[name], [*by_head(), slopes()], differentiable=4)
    assert_no_loop_is_rewritten(report)


def test_the_loop_that_the_near_misses_change_is_read() -> None:
    report = check_like_eager(block_loop(), [*by_head(), slopes()], differentiable=4)
    assert [site.verdict for site in report.attention] == ["rewritten"]


def token_loop(update: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """A token at a time; `update` of the state, key, value and gate."""

    def attend(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        out, state = torch.zeros_like(v), q.new_zeros(B, H, D, E)
        for t in range(q.shape[2]):
            state = update(state, k[:, :, t, :, None], v[:, :, t, None, :], g[:, :, t, ..., None])
            out[:, :, t] = (q[:, :, t, None] @ state)[..., 0, :]
        return out

    return attend


OTHERS: dict[str, tuple[Attend, Tensor]] = {
    "decayed after the key is added": (
        token_loop(lambda s, k, v, g: (s + k * v) * g[..., None].exp()),
        gates(),
    ),
    "a gate for each feature": (token_loop(lambda s, k, v, g: s * g.exp() + k * v), -torch.rand(B, H, S, D)),
    "a delta rule": (
        token_loop(lambda s, k, v, g: s + k * ((v - (s * k).sum(-2, keepdim=True)) * g[..., None].exp())),
        gates(),
    ),
    "a state that is clamped": (
        token_loop(lambda s, k, v, g: (s * g[..., None].exp() + k * v).clamp(-1, 1)),
        gates(),
    ),
    "a state that is squashed": (
        token_loop(lambda s, k, v, g: (s * g[..., None].exp() + k * v).tanh()),
        gates(),
    ),
    "values gated instead": (token_loop(lambda s, k, v, g: s + k * v * g[..., None].exp() ** 2 * v), gates()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_recurrence_stays(name: str) -> None:
    attend, gate = OTHERS[name]
    report = check_like_eager(attend, [*by_head(), gate], differentiable=4)
    assert_no_loop_is_rewritten(report)


def test_running_sums_over_another_dimension_stay() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        states = torch.einsum("...nd,...ne->...nde", k, v).cumsum(dim=-2)
        return torch.einsum("...nde,...nd->...ne", states, q)

    report = check_like_eager(attend, by_head(), differentiable=3)
    assert_no_loop_is_rewritten(report)


def test_running_sums_are_read_whatever_the_sizes_have_in_common() -> None:
    inputs = [torch.randn(4, 4, 4, 4) for _ in range(3)]
    report = check_like_eager(running_sums, inputs, differentiable=3)
    assert [site.verdict for site in report.attention] == ["rewritten"]


def test_a_detached_state_keeps_its_gradient() -> None:
    update = token_loop(lambda s, k, v, g: s.detach() * g[..., None].exp() + k * v)
    report = check_like_eager(update, [*by_head(), gates()], differentiable=4)
    assert_no_loop_is_rewritten(report)


def test_a_view_of_the_output_that_is_read_before_the_loop_ends() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, state = torch.zeros_like(v), q.new_zeros(B, H, D, E)
        early = out.sum()
        for t in range(q.shape[2]):
            state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
            out[:, :, t] = (q[:, :, t, None] @ state)[..., 0, :]
            early = out.sum() if t == 3 else early
        return out, early

    check_like_eager(attend, by_head(), differentiable=3)


def test_an_output_that_is_written_to_after_the_loop() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, state = torch.zeros_like(v), q.new_zeros(B, H, D, E)
        for t in range(q.shape[2]):
            state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
            out[:, :, t] = (q[:, :, t, None] @ state)[..., 0, :]
        out[:, :, 0] = 7.0
        return out

    check_like_eager(attend, by_head(), differentiable=3)


def multiplied_tokens(q: Tensor, k: Tensor, v: Tensor, factor: Tensor) -> Tensor:
    """The state is multiplied by a factor (B, H, S) at each token."""
    rows, state = [], q.new_zeros(B, H, D, E)
    for t in range(q.shape[2]):
        state = state * factor[:, :, t, None, None] + k[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append(q[:, :, t, None] @ state)
    return torch.cat(rows, 2)


def test_a_factor_that_may_be_negative_stays() -> None:
    report = check_like_eager(multiplied_tokens, [*by_head(), torch.randn(B, H, S)], differentiable=4)
    assert_no_loop_is_rewritten(report)
    assert any("positive" in site.reason for site in report.attention)


def test_a_factor_that_is_positive_becomes_its_logarithm() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> Tensor:
        return multiplied_tokens(q, k, v, x.sigmoid())

    report = check_like_eager(attend, [*by_head(), torch.randn(B, H, S)], differentiable=4)
    assert [(site.verdict, site.nearest_rule) for site in report.attention] == [("rewritten", "linear loop")]


def hyper_connections(x: Tensor, mixed: Tensor, given: Tensor) -> Tensor:
    """Streams of a residual that are mixed and added to at each layer; x (B, S, streams, D), mixed, given a layer each.

    (Zhu et al. 2024, arXiv:2409.19606, as transformers' deepseek_v4 spells it.)
    """
    for matrix, weight in zip(mixed.softmax(-1), given.sigmoid(), strict=True):
        read = (weight.unsqueeze(-1) * x).sum(2)
        x = weight.unsqueeze(-1) * torch.tanh(read).unsqueeze(-2) + matrix.mT @ x
    return x.flatten(2)


def alternating_updates(x: Tensor, mixed: Tensor, given: Tensor) -> Tensor:
    """Streams that predict one another, and are corrected by what one of them became (transformers, gemma3n)."""
    x = x.permute(2, 0, 1, 3)
    for matrix, weight in zip(mixed.tanh(), given.tanh(), strict=True):
        predicted = (x.permute(1, 2, 3, 0) @ matrix).permute(3, 0, 1, 2) + x
        news = torch.tanh(predicted[0]) - predicted[0]
        x = news * weight.permute(2, 0, 1).unsqueeze(-1) + predicted
    return x.sum(0)


@pytest.mark.parametrize("streams", [3, D, B])
@pytest.mark.parametrize("function", [hyper_connections, alternating_updates])
def test_recurrences_over_layers_have_no_entry(function: Attend, streams: int) -> None:
    layers = 4
    inputs = [
        torch.randn(B, S, streams, D),
        torch.randn(layers, B, S, streams, streams),
        torch.randn(layers, B, S, streams),
    ]
    report = check_like_eager(function, inputs, differentiable=3)
    assert [site.reason for site in report.sites if site.family == "linear"] == []


def test_sums_of_products_at_each_position_are_not_cut_out() -> None:
    def layers(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        for _ in range(3):
            x = (x.unsqueeze(-1) * y.unsqueeze(-2)).sum(-1) + z
        return x.sum(-1)

    shadow = shadow_of(layers, *(torch.randn(2, S, D) for _ in range(3)))
    assert [regions(shadow, candidate) for candidate in candidates(shadow)] == [[]]
