"""Inner values that are written in place and looked at elsewhere, and axes that no operand holds any more."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


def scaled_scores_that_are_masked_later(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scaled = (q @ k.mT).mul_(0.25)
    masked = scaled.add_(torch.full((7, 7), -1e3, dtype=q.dtype).triu(1))
    return masked.softmax(-1) @ v + scaled.sum()


def buffer_returned(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    buffer = torch.zeros(2, 7, 7, dtype=q.dtype)
    return buffer.baddbmm_(q, k.mT, beta=0).softmax(-1) @ v, buffer


def buffer_seen_through_a_view(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    buffer = torch.zeros(2, 7, 7, dtype=q.dtype)
    view = buffer.view(14, 7)
    return buffer.baddbmm_(q, k.mT, beta=0).softmax(-1) @ v + view.sum()


def one_query_for_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[:, :1].expand(-1, 7, -1) @ k.mT).softmax(-1) @ v


def one_sequence_for_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x[:1].expand(2, -1, -1) for x in (q, k, v))
    return (q @ k.mT).softmax(-1) @ v


PROGRAMS = [
    scaled_scores_that_are_masked_later, buffer_returned, buffer_seen_through_a_view, one_query_for_all,
    one_sequence_for_all,
]  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("attend", PROGRAMS, ids=lambda f: f.__name__)
def test_the_result_is_eagers(attend: Callable[..., object], *, dynamic: bool) -> None:
    check_like_eager(attend, torch.randn(3, 2, 7, 8).unbind(), differentiable=3, dynamic=dynamic)


def test_a_loop_whose_keys_change_on_the_way_is_left_alone() -> None:
    def tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, rows, state = k * 1, [], torch.zeros(2, 3, 8, 8, dtype=q.dtype)
        for t in range(9):
            if t == 6:
                k[0].relu_()
            state = 0.9 * state + k[:, :, t : t + 1].mT @ v[:, :, t : t + 1]
            rows.append(q[:, :, t : t + 1] @ state)
        return torch.cat(rows, 2)

    report = check_like_eager(tokens, torch.randn(3, 2, 3, 9, 8).unbind())
    assert report.having("rewritten") == ()
