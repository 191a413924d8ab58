"""Biases that are added to a block of the scores in place, as multiscale vision transformers do; and other writes."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

B, H, N = 2, 3, 10
Q, K, V = torch.randn(3, B, H, N, 4).unbind()
R = torch.randn(B, H, N - 1, N - 1)
#: Rows and columns of an image of 3 by 3, behind a class token.
UP, LEFT = torch.randn(2, B, H, 3, 3, 3).unbind()
Write = Callable[[Tensor, Tensor], object]


def written(write: Write) -> Callable[..., Tensor]:
    """Softmax attention over scores to which `write` has written."""

    def attend(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) * 0.5
        write(scores, r)
        return scores.softmax(-1) @ v

    return attend


def add(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] += r


def store(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] = scores[:, :, 1:, 1:] + r


def store_turned(scores: Tensor, r: Tensor) -> None:
    scores[..., :-1, :-1] = r * 2 + scores[..., :-1, :-1]


def subtract_from_keys(scores: Tensor, r: Tensor) -> None:
    scores[..., 1:] -= r[:, :, :1, :1] * torch.ones(B, H, N, N - 1, dtype=r.dtype)


def add_by_name(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:].add_(r, alpha=0.5)


def add_shared(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] += r[0, 0]


def add_twice(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] += r
    scores[:, :, :-1, :-1] += r * r


def add_narrowed(scores: Tensor, r: Tensor) -> None:
    scores.narrow(2, 1, N - 1)[..., 1:].add_(r)


def add_middle(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 2:6, 3:-1] += r[:, :, :4, :6]


BIASES: list[tuple[Write, int]] = [
    (add, 1), (store, 1), (store_turned, 1), (subtract_from_keys, 1), (add_by_name, 1), (add_shared, 1),
    (add_twice, 2), (add_middle, 1),
]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("write", "biases"), BIASES)
def test_what_is_added_to_a_block_is_a_bias(write: Write, biases: int, *, dynamic: bool) -> None:
    inputs = (Q, K, V, R)
    (site,) = check_like_eager(written(write), inputs, differentiable=4, dynamic=dynamic).attention
    assert site.verdict == "rewritten", site.reason
    assert site.spec.endswith({1: "full bias", 2: "full bias x2"}[biases]), site.spec


@pytest.mark.parametrize("token", [0, 1])
def test_relative_positions_of_an_image_are_two_biases(token: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, up: Tensor, left: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        block = scores[:, :, token:, token:].view(B, -1, 3, 3, 3, 3)
        block = block + up[..., None] + left[..., None, :]
        scores[:, :, token:, token:] = block.reshape(B, -1, 9, 9)
        out = scores.softmax(-1) @ v
        out[:, :, token:] += q[:, :, token:]
        return out

    q, k, v = (x[:, :, : 9 + token] for x in (Q, K, V))
    (site,) = check_like_eager(attend, (q, k, v, UP, LEFT), differentiable=5).attention
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=1 full bias x2"), site.reason


def test_a_large_batch_is_checked_at_a_small_one() -> None:
    q, k, v = torch.randn(3, 3000, H, 23, 4).unbind()
    (site,) = check_like_eager(written(add), (q, k, v, torch.randn(3000, H, 22, 22))).attention
    assert site.verdict == "rewritten", site.reason
    assert site.error is not None


def test_a_causal_mask_holds_beside_a_block() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        scores[:, :, 1:, 1:] += r
        hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

    (site,) = check_like_eager(attend, (Q, K, V, R), differentiable=4).attention
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=1 causal bias"), site.reason


def multiply(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] *= r


def halve(scores: Tensor, _: Tensor) -> None:
    scores[:, :, 1:, 1:] *= 0.5


def shift(scores: Tensor, _: Tensor) -> None:
    scores[:, :, 1:, 1:] += 0.5


def overwrite(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] = r


def move(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] = scores[:, :, :-1, :-1] + r


def add_itself(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] += scores[:, :, 1:, 1:] * r


def add_other_block(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] += scores[:, :, :-1, :-1] + r


def turn(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] = scores[:, :, 1:, 1:].mT + r


def add_to_old(scores: Tensor, r: Tensor) -> None:
    old = scores[:, :, 1:, 1:] + r
    scores[:, :, 1:, 1:] *= 0.5
    scores[:, :, 1:, 1:] = old


def add_to_overlapping_old(scores: Tensor, r: Tensor) -> None:
    old = scores[:, :, 1:, 1:] + r
    scores[:, :, :-1, :-1] += r
    scores[:, :, 1:, 1:] = old


def add_to_copy(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:].clone().add_(r)


def add_every_other(scores: Tensor, r: Tensor) -> None:
    scores[:, :, ::2, ::2] += r[:, :, :5, :5]


def add_one_row(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 0, 1:] += r[:, :, 0]


def add_one_head(scores: Tensor, r: Tensor) -> None:
    scores[:, 1:, 1:, 1:] += r[:, 1:]


def add_by_key(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] += r[:, :, :1]


def hide(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] += torch.where(r > 0, 0.0, -torch.inf)


def hide_low(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] += (r > 0) * -1e9


def fill(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:].masked_fill_(r > 1, -torch.inf)


def twice_the_same(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] += r
    r.mul_(2.0)
    scores[:, :, 1:, 1:] += r


def multiply_between(scores: Tensor, r: Tensor) -> None:
    scores[:, :, 1:, 1:] += r
    scores.mul_(0.5)
    scores[:, :, 1:, 1:] += r


REFUSED = (
    multiply, halve, shift, overwrite, move, turn, add_to_old, add_to_overlapping_old, add_every_other,
    add_one_row, add_one_head, add_by_key, hide, hide_low, fill,
)  # fmt: skip
COMPUTED = (add_other_block, add_to_copy, multiply_between, add_narrowed)


@pytest.mark.parametrize("write", REFUSED)
def test_other_writes_to_a_block_are_refused(write: Write) -> None:
    report = check_like_eager(written(write), (Q, K, V, R), differentiable=4)
    assert report.having("rewritten") == ()


@pytest.mark.parametrize("write", COMPUTED)
def test_other_writes_compute_what_eager_computes(write: Write) -> None:
    check_like_eager(written(write), (Q, K, V, R), differentiable=4)


def test_a_block_added_to_itself_is_no_bias() -> None:
    """Eager mode itself has no gradient for it."""
    report = check_like_eager(written(add_itself), (Q, K, V, R))
    assert report.having("rewritten") == ()


def test_a_bias_changed_between_two_writes_counts_as_it_was() -> None:
    check_like_eager(written(lambda s, r: twice_the_same(s, r * 1.0)), (Q, K, V, R), differentiable=4)


def test_scores_needed_before_the_write_stay() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-2, -1)
        before = scores * 2
        scores[:, :, 1:, 1:] += r
        return scores.softmax(-1) @ v, before

    check_like_eager(attend, (Q, K, V, R), differentiable=4)


def test_scores_written_into_an_input_stay_there() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        kept.copy_(q @ k.transpose(-2, -1))
        return kept.softmax(-1) @ v, kept * 2

    check_like_eager(attend, (Q, K, V, torch.zeros(B, H, N, N)))
