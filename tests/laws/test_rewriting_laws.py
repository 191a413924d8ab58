"""Laws of attention hold for what attnopt puts in its place, and rewriting again changes nothing."""

from dataclasses import replace

import pytest
import torch
from compiling import Run, assert_runs_agree, widened
from graphs import rewritten, site_of
from hypothesis import given
from hypothesis import strategies as st
from strategies import Attention, Meaning, meanings, plainly, writings
from torch import Tensor

import attnopt
from attnopt.mask import KeyPadding

Inputs = tuple[Tensor, ...]


def computed(attention: Attention, inputs: Inputs) -> Tensor:
    return rewritten(attention, *inputs)(*inputs)


def of_keys_in_any_order(meaning: Meaning) -> Meaning:
    """With a padding mask, and with nothing in which the place or the number of the keys has a part."""
    return replace(meaning, causal=False, bias=False, padding=True)


def assert_equal(got: Tensor, wanted: Tensor) -> None:
    """But for rounding in fp64."""
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12, equal_nan=True)


@given(
    meaning=meanings,
    writing=writings(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
def test_any_writing_computes_what_eager_computes(
    meaning: Meaning, writing: object, dtype: torch.dtype
) -> None:
    attention, inputs = Attention(meaning, writing), meaning.inputs(dtype)
    eager, exact = attention(*inputs), attention(*widened(inputs))
    assert_runs_agree(Run((computed(attention, inputs),), ()), Run((exact,), ()), Run((eager,), ()))


@given(meaning=meanings, writing=writings(), layout=st.sampled_from(["transposed", "sliced", "expanded"]))
def test_the_layout_of_the_inputs_changes_nothing(meaning: Meaning, writing: object, layout: str) -> None:
    q, k, v, keep, bias = meaning.inputs()
    moved = tuple(LAYOUTS[layout](x) for x in (q, k, v))
    attention = Attention(meaning, writing)
    assert_equal(computed(attention, (*moved, keep, bias)), attention(*moved, keep, bias))


LAYOUTS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sliced": lambda x: torch.cat([x, x], dim=-1)[..., : x.shape[-1]],
    "expanded": lambda x: x[:1].expand(x.shape),
}


@given(meaning=meanings.map(of_keys_in_any_order), more=st.integers(1, 5))
def test_masked_keys_may_be_appended(meaning: Meaning, more: int) -> None:
    q, k, v, keep, bias = meaning.inputs()
    keep[:, 0] = True
    longer = [
        torch.cat([x, 9.0 * torch.ones_like(x[:, :, :1]).expand(-1, -1, more, -1)], dim=2) for x in (k, v)
    ]
    kept = torch.cat([keep, torch.zeros(keep.shape[0], more, dtype=torch.bool)], dim=1)
    attention = plainly(meaning)
    assert_equal(computed(attention, (q, *longer, kept, bias)), computed(attention, (q, k, v, keep, bias)))


@given(meaning=meanings)
def test_shared_heads_are_heads_repeated(meaning: Meaning) -> None:
    q, k, v, keep, bias = meaning.inputs()
    alone = replace(meaning, kv_heads=q.shape[1], share=1)
    repeated = [x.repeat_interleave(meaning.share, dim=1) for x in (k, v)]
    assert_equal(
        computed(plainly(meaning), (q, k, v, keep, bias)),
        computed(plainly(alone), (q, *repeated, keep, bias)),
    )


@given(meaning=meanings.map(of_keys_in_any_order), seed=st.integers(0, 9))
def test_the_order_of_the_keys_changes_nothing(meaning: Meaning, seed: int) -> None:
    q, k, v, keep, bias = meaning.inputs()
    order = torch.randperm(meaning.sk, generator=torch.Generator().manual_seed(seed))
    attention = plainly(meaning)
    moved = (q, k[:, :, order], v[:, :, order], keep[:, order], bias)
    assert_equal(computed(attention, moved), computed(attention, (q, k, v, keep, bias)))


@given(meaning=meanings, writing=writings())
def test_values_enter_linearly(meaning: Meaning, writing: object) -> None:
    q, k, v, keep, bias = meaning.inputs()
    run = rewritten(Attention(meaning, writing), q, k, v, keep, bias)
    assert_equal(run(q, k, 2 * v, keep, bias), 2 * run(q, k, v, keep, bias))


class Stacked(torch.nn.Module):
    """Two attentions, of which the second attends from the result of the first."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor, bias: Tensor) -> Tensor:
        return self.attention(self.attention(q, k, v, keep, bias), k, v, keep, bias)


@pytest.mark.parametrize(
    "meaning", [Meaning(dv=8, causal=True), Meaning(dv=8, bias=True), Meaning(dv=8, softcap=5.0)]
)
def test_rewriting_twice_is_rewriting_once(meaning: Meaning) -> None:
    program = torch.export.export(Stacked(plainly(meaning)), meaning.inputs())
    once, first = attnopt.rewrite(program)
    twice, second = attnopt.rewrite(once)
    assert [site.verdict for site in first.sites] == ["rewritten", "rewritten"]
    assert {site.verdict for site in second.sites} <= {"kept"}
    assert str(twice.graph) == str(once.graph)


def test_a_padding_mask_is_named_in_the_spec() -> None:
    meaning = Meaning(padding=True)
    assert site_of(plainly(meaning), *meaning.inputs()).spec.mask == KeyPadding("padding")
