"""fp32's lowest number is no fp16 number: https://github.com/pytorch/pytorch/pull/196118."""

import pytest
import torch
from compiling import check_like_eager, compiled
from torch import Tensor

from attnopt import reports


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["sdpa", "streaming"])
def test_a_mask_is_added_in_the_dtype_in_which_it_is_found(dtype: torch.dtype, kernel: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return (q @ k.mT + mask).softmax(-1).to(v.dtype) @ v

    mask = torch.where(torch.rand(7, 7) > 0.5, 0.0, torch.finfo(torch.float32).min)
    mask[3] = torch.finfo(torch.float32).min  # a row that sees nothing: the mean of all values
    inputs = (*torch.randn(3, 2, 4, 7, 16).to(dtype), mask)
    with torch.no_grad():
        report = check_like_eager(attend, inputs, allow=(kernel,))
    assert [site.verdict for site in report.sites] == ["rewritten"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_mask_that_overflows_in_a_later_cast_is_minus_infinity(dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = (q @ k.mT).float().masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
        return scores.to(dtype).softmax(-1) @ v

    keep = torch.tensor([[True] * 7, [False] * 7])
    inputs = (*torch.randn(3, 2, 4, 7, 16).to(dtype), keep)
    out = compiled(attend)(*inputs)
    (site,) = reports()[-1].sites
    assert site.verdict == "refused"
    assert f"is -inf in {str(dtype).removeprefix('torch.')}, to which the scores are cast" in site.reason
    assert bool(out[1].isnan().all())
    torch.testing.assert_close(out[0], attend(*inputs)[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_where_every_query_sees_a_key_the_overflow_changes_nothing(dtype: torch.dtype) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later = torch.ones(7, 7, dtype=torch.bool).triu(1)
        scores = (q @ k.mT).float().masked_fill(later, torch.finfo(torch.float32).min)
        return scores.to(v.dtype).softmax(-1) @ v

    (site,) = check_like_eager(attend, torch.randn(3, 2, 4, 7, 16).to(dtype), differentiable=3).sites
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=1 causal")


def test_a_model_in_fp64_whose_softmax_is_fp32_has_the_same_overflow() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, torch.finfo(q.dtype).min)
        scores = q @ k.mT + mask[:, None, None]
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v

    keep = torch.tensor([[True] * 7, [False] * 7])
    inputs = (*torch.randn(3, 2, 4, 7, 16, dtype=torch.float64), keep)
    out = compiled(attend)(*inputs)
    assert torch.equal(out.isnan(), attend(*inputs).isnan())
    (site,) = reports()[-1].sites
    assert "is -inf in float32" in site.reason
