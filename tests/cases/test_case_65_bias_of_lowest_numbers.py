"""Gradients beside a row of large finite numbers: a blockwise backward pass takes them from a sum that those absorb."""

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor


@pytest.mark.parametrize("lowest", [-1e9, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_float_mask_from_outside_has_eagers_gradients(lowest: float, kernel: str, *, dynamic: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT + (mask * lowest)[:, None, None]).softmax(-1) @ v

    hidden = torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 1]])
    inputs = (*torch.randn(3, 3, 2, 5, 4), hidden)
    report = check_like_eager(attend, inputs, differentiable=3, dynamic=dynamic, allow=(kernel,))
    assert bool(report.having("rewritten")) == (kernel == "streaming")


@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_lowest_number_for_all_keys_of_a_row_has_eagers_gradients(kernel: str, *, dynamic: bool) -> None:
    """It hides no key from another, but absorbs the scores."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT * 0.5 + (mask * torch.finfo(torch.float32).min)[:, None, :, None]).softmax(-1) @ v

    hidden = torch.tensor([[1.0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 1]])
    inputs = (*torch.randn(3, 3, 2, 5, 4), hidden)
    report = check_like_eager(attend, inputs, differentiable=3, dynamic=dynamic, allow=(kernel,))
    assert bool(report.having("rewritten")) == (kernel == "streaming")


def test_without_gradients_the_library_serves_it() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT + mask).softmax(-1) @ v

    with torch.no_grad():
        report = check_like_eager(attend, (*torch.randn(3, 1, 2, 5, 4), torch.randn(5, 5)), allow=("sdpa",))
    assert report.having("rewritten")


def test_numbers_that_hide_are_not_multiplied_by_a_tensor_that_learns() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: Tensor, keep: Tensor) -> Tensor:
        return ((q @ k.mT + torch.where(keep[:, None, None], 0.0, -1e9)) * scale).softmax(-1) @ v

    keep = torch.tensor([[True] * 5, [False] * 5])
    inputs = (*torch.randn(3, 2, 2, 5, 4), torch.tensor(0.7), keep)
    report = check_like_eager(attend, inputs, differentiable=4)
    assert not report.having("rewritten")
    assert "swamp" in report.attention[0].reason
