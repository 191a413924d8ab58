"""Rows that fade out below what fp32 holds are judged by their size; all others by the row rule."""

import pytest
import torch
from lightning_judging import FAINT, assert_rows
from torch import Tensor

EXACT = torch.tensor([[1.0, 0.5], [3e-45, 3e-45], [2e-30, 1e-30]], dtype=torch.float64)


def check(row: int, values: list[float], dtype: torch.dtype = torch.float32) -> None:
    got = EXACT.clone()
    got[row] = torch.tensor(values, dtype=torch.float64)
    assert_rows(got.float(), EXACT, EXACT.float(), dtype, 3.0, "state")


@pytest.mark.parametrize("values", [[3e-45, 3e-45], [0.0, 1.4e-45], [-1e-40, 0.0]])
def test_a_row_below_the_numbers_of_fp32_may_be_any_of_them(values: list[float]) -> None:
    check(1, values)


@pytest.mark.parametrize("values", [[4 * FAINT, 0.0], [1e-20, 0.0], [torch.nan, 0.0], [torch.inf, 0.0]])
def test_but_it_is_not_there(values: list[float]) -> None:
    with pytest.raises(AssertionError):
        check(1, values)


@pytest.mark.parametrize(("row", "values"), [(0, [1.0, 0.55]), (2, [2e-30, 0.0]), (2, [torch.nan, 1e-30])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_rows_keep_the_row_rule(row: int, values: list[float], dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError):
        check(row, values, dtype)


def test_zeros_are_zeros() -> None:
    zeros: Tensor = torch.zeros(2, 3, dtype=torch.float64)
    assert_rows(zeros.float(), zeros, zeros.float(), torch.float32, 2.0, "state")
