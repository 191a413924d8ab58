"""Scores that are a sum of products are read as one product, of all features side by side."""

import pytest
import torch
from compiling import check_like_eager
from graphs import site_of
from torch import Tensor

from attnopt.passes.site import Operand

B, H, SQ, SK, D, R = 2, 4, 7, 9, 16, 6
NEG_INF = float("-inf")


def tensors(queries: int = SQ, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """q, k, v, and the positional parts of queries and keys, of which all heads share the latter."""
    shapes = ((B, H, queries, D), (B, H, SK, D), (B, H, SK, D), (B, H, queries, R), (B, 1, SK, R))
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


def below(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).tril()


# arXiv 2405.04434, equations 14 to 17


def latent(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    return ((q @ k.mT + qr @ kr.mT) * 0.2).softmax(-1) @ v


def latent_by_letters(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    by_content = torch.einsum("bhid,bhjd->bhij", q, k)
    return ((by_content + torch.einsum("bhir,bjr->bhij", qr, kr[:, 0])) * 0.2).softmax(-1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    scores = (q @ k.mT + qr @ kr.mT) * 0.2
    return scores.masked_fill(~below(scores), NEG_INF).softmax(-1) @ v


def masked_before_the_sum(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    scores = q @ k.mT * 0.2
    return (scores.masked_fill(~below(scores), NEG_INF) + qr @ kr.mT * 0.2).softmax(-1) @ v


def of_unequal_scales(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    return (q @ k.mT * 0.2 + (qr / 3) @ kr.mT * 0.5).softmax(-1) @ v


def a_difference(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    return (q @ k.mT * 0.2 - qr @ kr.mT).softmax(-1) @ v


def three_products(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    return ((q @ k.mT + qr @ kr.mT + qr.sin() @ kr.cos().mT) * 0.2).softmax(-1) @ v


def scaled_by_head(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    return (q @ k.mT * 0.2 + qr @ kr.mT * v[:1, :, :1, :1]).softmax(-1) @ v


def of_positions_alone(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    return (q @ k.mT * 0.2 + qr[0, 0] @ kr[0, 0].mT).softmax(-1) @ v


JOINED = (
    latent, latent_by_letters, of_unequal_scales, a_difference, three_products, scaled_by_head, of_positions_alone,
)  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("attend", [*JOINED, causal, masked_before_the_sum], ids=lambda f: f.__name__)
def test_a_sum_of_products_is_one_product(attend, dynamic):
    report = check_like_eager(attend, tensors(), differentiable=5, dynamic=dynamic)
    (site,) = report.attention
    mask = "full" if attend in JOINED else "causal"
    assert (site.verdict, site.spec) == ("rewritten", f"softmax scale=0.2 {mask}"), site.reason
    assert site.error is not None
    assert site.error <= 1e-9


def test_a_learned_temperature_of_the_sum_stays_one():
    def attend(q, k, v, qr, kr):
        return ((q @ k.mT + qr @ kr.mT) * v[:1, :, :1, :1]).softmax(-1) @ v

    (site,) = check_like_eager(attend, tensors(), differentiable=5).attention
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=tensor full")


def test_the_parts_stand_behind_one_another():
    site = site_of(three_products, *tensors())
    q, k = (site.operands[name] for name in "qk")
    assert isinstance(q, Operand)
    assert isinstance(k, Operand)
    assert (len(q.beside), len(k.beside)) == (2, 2)
    assert sum(a.size for a in site.result.roles.more) == 2 * R


def test_half_types_are_joined_in_the_wider_one():
    def attend(q, k, v, qr, kr):
        return ((q @ k.mT).float() * 0.2 + qr.float() @ kr.float().mT).softmax(-1).to(v.dtype) @ v

    q, k, v, qr, kr = tensors(dtype=torch.bfloat16)
    (site,) = check_like_eager(attend, (q, k, v, qr, kr), differentiable=5).attention
    assert (site.verdict, site.spec) == ("rewritten", "softmax scale=0.2 full"), site.reason


# --- near misses: the other product stays what is added ---


def of_a_single_query(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    return latent(q[:, :, :1], k, v, qr[:, :, :1], kr)


def with_keys_of_each_query_head(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    shared = k[:, :1].expand(B, H, SK, D)
    return ((q @ shared.mT + qr @ (kr * qr[:, :, :1]).mT) * 0.2).softmax(-1) @ v[:, :1].expand(B, H, SK, D)


def summed_over_heads(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    mixed = torch.einsum("bhir,bjr->bij", qr, kr[:, 0])
    return (q @ k.mT * 0.2 + mixed[:, None]).softmax(-1) @ v


def of_keys_that_vary_by_query(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    relative = (qr[0, 0, :, None] - kr[0, 0]).sin()
    return (q @ k.mT * 0.2 + torch.einsum("bhir,ijr->bhij", qr, relative)).softmax(-1) @ v


def of_which_one_is_gated(q: Tensor, k: Tensor, v: Tensor, qr: Tensor, kr: Tensor) -> Tensor:
    return (q @ k.mT * v[:1, :, :1, :1] + qr @ kr.mT).softmax(-1) @ v


NEAR = (
    of_a_single_query, with_keys_of_each_query_head, summed_over_heads, of_keys_that_vary_by_query,
    of_which_one_is_gated,
)  # fmt: skip


@pytest.mark.parametrize("attend", NEAR, ids=lambda f: f.__name__)
def test_products_that_do_not_pair_alike_are_added(attend):
    (site,) = check_like_eager(attend, tensors(), differentiable=5).attention
    assert site.verdict == "rewritten", site.reason
    assert site.spec.endswith("full bias")


def test_a_finite_mask_before_the_sum_is_no_mask_of_the_sum():
    def attend(q, k, v, qr, kr):
        low = torch.finfo(q.dtype).min
        scores = (q @ k.mT).masked_fill(
            v[:, :1, :1, :1] > 0, low
        )  # whole rows: the other product decides there
        return (scores + 1e30 * (qr @ kr.mT)).softmax(-1) @ v

    report = check_like_eager(attend, tensors())
    assert report.having("rewritten") == ()


def test_inside_a_soft_cap_the_sum_is_left_alone():
    def attend(q, k, v, qr, kr):
        return (((q @ k.mT + qr @ kr.mT) / 20).tanh() * 20).softmax(-1) @ v

    (site,) = check_like_eager(attend, tensors()).attention
    assert (site.verdict, site.reason) == ("refused", "a bias inside a soft cap is not understood")
