"""How an attention is written changes nothing of what is read: one meaning, one spec."""

import math
from dataclasses import replace
from functools import cache

from graphs import shadow_of, site_of
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import NOISE, Attention, Meaning, Writing, meanings, plainly, writings

from attnopt import verify
from attnopt.pipeline import read
from attnopt.registry import rules
from attnopt.spec import AttentionSpec


@cache
def spec_of(attention: Attention) -> AttentionSpec:
    """What is read, after the check in fp64 has agreed."""
    inputs = attention.meaning.inputs()
    shadow = shadow_of(attention, *inputs)
    (found,) = read(shadow, rules())
    assert found.site is not None, found.reject
    check = verify.validate(shadow, found.site, {})
    assert check.agrees, check.reason
    return found.site.spec


def assert_reads_alike(one: Attention, other: Attention) -> None:
    """Equal specs; scales may differ by the rounding of their roots."""
    first, second = spec_of(one), spec_of(other)
    assert math.isclose(first.scale, second.scale, rel_tol=1e-12)
    assert replace(first, scale=1.0) == replace(second, scale=1.0)


@given(
    meaning=meanings, place=st.sampled_from(["q", "k", "both"]), by=st.sampled_from(["mul", "div", "tensor"])
)
def test_the_scale_may_stand_anywhere(meaning: Meaning, place: str, by: str) -> None:
    assert_reads_alike(plainly(meaning), Attention(meaning, Writing(scale_on=place, scale_by=by)))


@given(meaning=meanings, product=st.sampled_from(["matmul", "einsum", "bmm", "turned"]))
def test_operands_commute(meaning: Meaning, product: str) -> None:
    assert_reads_alike(plainly(meaning), Attention(meaning, Writing(commuted=True, product=product)))


@given(meaning=meanings, by=st.sampled_from(["added", "where"]))
def test_a_mask_may_be_added_filled_or_chosen(meaning: Meaning, by: str) -> None:
    assert_reads_alike(plainly(meaning), Attention(meaning, Writing(mask_by=by)))


@given(
    meaning=meanings,
    noise=st.sampled_from(sorted(NOISE)),
    place=st.sampled_from(["q", "k", "v", "scores", "weights"]),
)
def test_what_does_nothing_changes_nothing(meaning: Meaning, noise: str, place: str) -> None:
    assert_reads_alike(plainly(meaning), Attention(meaning, Writing(noise=((place, noise),))))


@given(meaning=meanings, writing=writings())
def test_any_writing_reads_like_the_plain_one(meaning: Meaning, writing: Writing) -> None:
    assert_reads_alike(plainly(meaning), Attention(meaning, writing))


@given(meaning=meanings, by=st.sampled_from(["expand", "interleave"]))
def test_shared_heads_are_read_as_the_repeated_ones_they_are(meaning: Meaning, by: str) -> None:
    assume(meaning.share > 1 and meaning.kv_heads > 1)
    site = site_of(Attention(meaning, Writing(heads_by=by)), *meaning.inputs())
    assert site.spec.heads.share == meaning.share
    assert [site.operands[name].node.op for name in "kv"] == ["placeholder", "placeholder"]


@given(meaning=meanings, writing=writings())
def test_a_spec_prints_in_one_line_and_always_the_same(meaning: Meaning, writing: Writing) -> None:
    attention = Attention(meaning, writing)
    first, again = (str(site_of(attention, *meaning.inputs()).spec) for _ in range(2))
    assert first == again
    assert "\n" not in first


@given(meaning=meanings)
def test_the_spec_says_what_the_attention_means(meaning: Meaning) -> None:
    spec = site_of(plainly(meaning), *meaning.inputs()).spec
    assert (spec.scale, spec.softcap, len(spec.bias)) == (meaning.scale, meaning.softcap, int(meaning.bias))
    assert ("padding" in str(spec.mask)) == meaning.padding
