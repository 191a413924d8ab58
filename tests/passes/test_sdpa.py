"""Laws of scaled_dot_product_attention: each argument means what torch documents, or the call is refused."""

import pytest
import torch
from compiling import check_like_eager
from graphs import reject_of, site_of
from torch.nn.functional import scaled_dot_product_attention as sdpa

from attnopt.mask import TOP_LEFT, Causal
from attnopt.spec import EmptyRow

SQ, SK, D = 5, 7, 16


def tensors(heads=4, kv_heads=4):
    return [torch.randn(2, h, s, D) for h, s in ((heads, SQ), (kv_heads, SK), (kv_heads, SK))]


def check(function, inputs, **options):
    (site,) = check_like_eager(function, inputs, **options).attention
    assert site.verdict in ("rewritten", "kept"), site.reason


def test_is_causal_is_top_left():
    def function(q, k, v):
        return sdpa(q, k, v, is_causal=True)

    assert site_of(function, *tensors()).spec.mask == Causal(TOP_LEFT)
    check(function, tensors(), differentiable=3)


def test_a_bool_mask_hides_and_a_row_without_keys_is_zero():
    def function(q, k, v, mask):
        return sdpa(q, k, v, attn_mask=mask)

    mask = torch.rand(2, 1, SQ, SK) > 0.5
    mask[0, 0, 2] = False
    spec = site_of(function, *tensors(), mask).spec
    assert (spec.bias, spec.empty_row) == ((), EmptyRow.ZERO)
    assert spec.mask.operand_names()
    check(function, [*tensors(), mask])


def test_a_float_mask_is_a_bias():
    def function(q, k, v, bias):
        return sdpa(q, k, v, attn_mask=bias)

    bias = torch.randn(4, SQ, SK)
    assert len(site_of(function, *tensors(), bias).spec.bias) == 1
    check(function, [*tensors(), bias], differentiable=3)


@pytest.mark.parametrize(("kv_heads", "share"), [(4, 1), (2, 2), (1, 4)])
def test_enable_gqa_shares_neighbouring_heads(kv_heads, share):
    def function(q, k, v):
        return sdpa(q, k, v, enable_gqa=True)

    assert site_of(function, *tensors(kv_heads=kv_heads)).spec.heads.share == share
    check(function, tensors(kv_heads=kv_heads))


def test_no_scale_is_one_by_the_root_of_a_known_d():
    site = site_of(sdpa, *tensors())
    assert (site.spec.scale, site.operands["q"].rsqrt) == (D**-0.5, ())


def test_no_scale_is_one_by_the_root_of_a_symbolic_d():
    site = site_of(sdpa, *tensors(), dynamic=True)
    (d,) = site.operands["q"].rsqrt
    assert (site.spec.scale, d) == (1.0, site.result.roles.d[0])
    assert d.size.free_symbols
    check(sdpa, tensors(), dynamic=True)


@pytest.mark.parametrize("scale", [0.3, 1, -2.0])
def test_a_scale_is_taken_as_it_is(scale):
    def function(q, k, v):
        return sdpa(q, k, v, scale=scale)

    assert site_of(function, *tensors()).spec.scale == scale
    check(function, tensors())


@pytest.mark.parametrize("p", [0.0, 0.25])
def test_dropout_is_part_of_the_spec(p):
    def function(q, k, v):
        return sdpa(q, k, v, dropout_p=p)

    assert site_of(function, *tensors()).spec.dropout == p


def test_a_call_whose_backend_was_chosen_is_read_alike():
    def chosen(q, k, v):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=0.5)[0]

    q, k, v = torch.randn(3, 2, 4, SQ, D).unbind()
    site = site_of(chosen, q, k, v)
    assert str(site.spec) == "softmax scale=0.5 causal"
    check_like_eager(chosen, (q, k, v))


def test_a_log_sum_that_is_used_too_and_an_unknown_alignment_are_refused():
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def both(q, k, v):
        out, total = flash(q, k, v)
        return out, total

    def unaligned(q, k, v):
        return flash(q, k, v, 0.0, True)[0]

    q, k, v = torch.randn(3, 2, 4, SQ, D).unbind()
    assert "something else than the output" in reject_of(both, q, k, v).reason
    assert "aligns a causal mask" in reject_of(unaligned, q, k[:, :, 1:], v[:, :, 1:]).reason


def test_dropout_of_everything_is_refused():
    def function(q, k, v):
        return sdpa(q, k, v, dropout_p=1.0)

    assert reject_of(function, *tensors()).reason == "dropout 1 on the attention weights leaves nothing"
