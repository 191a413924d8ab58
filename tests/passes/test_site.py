"""Laws of a site: each axis has the role that the formula gives it, and operands hold what they held."""

from math import prod

import pytest
import torch
from compiling import check_like_eager
from graphs import reject_of, site_of

B, H, KV, SQ, SK, D, DV = 2, 6, 3, 5, 7, 4, 8


def attend(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def tensors(*shapes):
    return [torch.randn(shape) for shape in shapes]


def mha(q, k, v):
    return attend(q, k, v)


def gqa(q, k, v):
    return attend(q, *(x.repeat_interleave(H // KV, dim=1) for x in (k, v)))


def tiled(q, k, v):
    return attend(q, *(x.repeat(1, H // KV, 1, 1) for x in (k, v)))


def grouped(q, k, v):
    return attend(q.unflatten(1, (KV, H // KV)), k[:, :, None], v[:, :, None]).flatten(1, 2)


def merged(q, k, v):
    return attend(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, (B, H))


Q, K, V = (B, H, SQ, D), (B, H, SK, D), (B, H, SK, DV)
KV_SHAPES = (B, KV, SK, D), (B, KV, SK, DV)
#: name: function, shapes, sizes of (batch, kv_heads, share, query, key, d, dv)
SPELLINGS = {
    "MHA": (mha, (Q, K, V), (B, H, 1, SQ, SK, D, DV)),
    "GQA": (gqa, (Q, *KV_SHAPES), (B, KV, 2, SQ, SK, D, DV)),
    "GQA, tiled": (tiled, (Q, *KV_SHAPES), (B, KV, 2, SQ, SK, D, DV)),
    "GQA, five dimensions": (grouped, (Q, *KV_SHAPES), (B, KV, 2, SQ, SK, D, DV)),
    "MQA": (mha, (Q, (B, 1, SK, D), (B, 1, SK, DV)), (B, 1, H, SQ, SK, D, DV)),
    "bmm": (mha, (Q[1:], K[1:], V[1:]), (H, 1, 1, SQ, SK, D, DV)),
    "bmm of merged heads": (merged, (Q, K, V), (B, H, 1, SQ, SK, D, DV)),
    "decode": (mha, ((B, H, 1, D), K, V), (B, H, 1, 1, SK, D, DV)),
    "GQA, decode": (gqa, ((B, H, 1, D), *KV_SHAPES), (B, KV, 2, 1, SK, D, DV)),
}


@pytest.mark.parametrize("name", sorted(SPELLINGS))
def test_each_axis_has_its_role(name):
    function, shapes, want = SPELLINGS[name]
    site = site_of(function, *tensors(*shapes))
    roles = site.result.roles
    groups = roles.batch, roles.kv_heads, roles.share, roles.query, roles.key, roles.d, roles.dv
    assert tuple(prod(a.size for a in axes) for axes in groups) == want
    assert site.spec.heads.share == want[2]


@pytest.mark.parametrize("name", ["MHA", "GQA", "GQA, tiled", "GQA, five dimensions", "decode"])
def test_operands_are_the_tensors_before_their_views(name):
    function, shapes, _ = SPELLINGS[name]
    site = site_of(function, *tensors(*shapes))
    held = [site.operands[x].node for x in "qkv"]
    assert [x.op for x in held] == ["placeholder"] * 3
    assert [tuple(x.meta["val"].shape) for x in held] == list(shapes)


def test_a_write_to_q_before_the_end_of_the_site_is_refused():
    def function(q, k, v):
        weights = (q @ k.mT).softmax(-1)
        q.mul_(2.0)
        return weights @ v

    assert reject_of(function, *tensors(Q, K, V)).reason.startswith("q is written to in place")


def test_a_write_to_a_view_of_k_before_the_end_of_the_site_is_refused():
    def function(q, k, v):
        weights = (q @ k.mT).softmax(-1)
        k.flatten(0, 1)[0].zero_()
        return weights @ v

    assert reject_of(function, *tensors(Q, K, V)).reason.startswith("k is written to in place")


def test_a_write_after_the_site_changes_nothing():
    def function(q, k, v):
        out = attend(q, k, v)
        q.mul_(2.0)
        return out

    assert site_of(function, *tensors(Q, K, V)).spec.family == "softmax"


def test_a_copy_that_is_written_to_is_not_taken_for_the_original():
    def function(q, k, v):
        held = q.clone()
        held[:, :, 0] = 0.0
        return attend(held, k, v)

    assert site_of(function, *tensors(Q, K, V)).operands["q"].node.target == torch.ops.aten.clone.default
    check_like_eager(function, tensors(Q, K, V))


def test_an_operand_that_is_written_to_between_two_reads_is_refused():
    def function(q, k, v):
        held = q * 1
        first = (held @ k.mT).softmax(-1)
        held[:, :, 0] = 0.0
        return first @ v + held.sum()

    reject = reject_of(function, *tensors(Q, K, V))
    assert reject.reason == "q is written to in place before the attention uses it"


@pytest.mark.parametrize(("where", "needless"), [("scores", False), ("weights", True)])
def test_weights_that_are_returned_make_a_call_needless_and_scores_do_not(where, needless):
    def function(q, k, v):
        scores = q @ k.mT * 0.5
        weights = scores.softmax(-1)
        return weights @ v, {"scores": scores, "weights": weights}[where]

    site = site_of(function, *tensors(Q, K, V))
    assert bool(site.needless) is needless


def test_keys_and_values_repeated_along_different_axes_are_heads_of_their_own():
    def function(q, k, v):
        return attend(q, k.repeat_interleave(2, dim=1), v.repeat(1, 2, 1, 1))

    roles = site_of(function, *tensors((B, 6, SQ, D), (B, 3, SK, D), (B, 3, SK, DV))).result.roles
    assert (prod(a.size for a in roles.batch), prod(a.size for a in roles.kv_heads), roles.share) == (
        B,
        6,
        (),
    )


def test_factors_of_q_and_of_k_are_one_scale():
    def function(q, k, v):
        return attend(q * 0.5, (k / 4.0).transpose(0, 1).transpose(0, 1), v)

    assert site_of(function, *tensors(Q, K, V)).spec.scale == 0.125
