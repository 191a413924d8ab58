"""The description of a site: printable, hashable, and plain about what a kernel must honour."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from attnopt.mask import Causal, KeyPadding, Window
from attnopt.spec import (
    NEUTRAL,
    Alibi,
    AttentionSpec,
    Decay,
    EmptyRow,
    Heads,
    Normaliser,
    Precision,
    Sparse,
    Stream,
    unread_fields,
)

PLAIN = AttentionSpec("softmax", scale=0.5)
#: Each field with a value that is not plain, and what the report prints for it.
CHANGES = {
    "heads": (Heads(4), "gqa=4"),
    "mask": (Causal() & Window(8), "causal & window(8)"),
    "empty_row": (EmptyRow.UNIFORM, "empty=uniform"),
    "bias": (("bias", "bias1"), "bias x2"),
    "softcap": (30.0, "softcap=30"),
    "alibi": (Alibi(), "alibi"),
    "sink_logits": (True, "sink logits"),
    "sink_per_query": (True, "per query"),
    "decay": (Decay.PER_TOKEN, "decay per token"),
    "normaliser": (Normaliser(floor=1.0), "normalised(eps=0, floor=1.0)"),
    "initial_state": (True, "initial state"),
    "final_state": (True, "final state"),
    "dropout": (0.25, "dropout=0.25"),
    "sparse": (Sparse(8, 16, 4), "sparq(r=8, k=16, l=4)"),
    "hidden_logit": (-10000.0, "hidden=-10000"),
    "stream": (Stream(4, 60), "positions as places (last 63)"),
}


def test_a_plain_spec_prints_family_scale_and_mask() -> None:
    assert str(PLAIN) == "softmax scale=0.5 full"
    assert str(AttentionSpec("linear", normaliser=Normaliser())) == "linear scale=1 full normalised"


def test_every_field_that_may_be_refused_is_tried_here() -> None:
    assert {*CHANGES} == {f.name for f in fields(AttentionSpec)} - NEUTRAL - {"scale"}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_plain_is_printed(name: str) -> None:
    value, text = CHANGES[name]
    assert text in str(replace(PLAIN, **{name: value}))
    assert text not in str(PLAIN)


@pytest.mark.parametrize("name", CHANGES)
def test_a_kernel_must_read_what_is_not_plain(name: str) -> None:
    spec = replace(PLAIN, **{name: CHANGES[name][0]})
    assert unread_fields(spec, frozenset({"scale"})) == (name,)
    assert unread_fields(spec, frozenset({"scale", name})) == ()


def test_rounding_and_scale_need_not_be_read() -> None:
    spec = replace(PLAIN, precision=Precision(scores=torch.float16), scale=3.0)
    assert unread_fields(spec, frozenset()) == ()


def test_operands_come_in_order_and_none_is_missing() -> None:
    spec = AttentionSpec(
        "softmax",
        mask=Causal() & KeyPadding("padding"),
        bias=("bias",),
        sink_logits=True,
        decay=Decay.PER_HEAD,
    )
    assert spec.operand_names() == ("q", "k", "v", "padding", "bias", "sink_logits", "log_decay")
    assert PLAIN.operand_names() == ("q", "k", "v")


def test_equal_specs_are_one_key_and_none_can_be_changed() -> None:
    assert len({PLAIN, AttentionSpec("softmax", scale=0.5), replace(PLAIN, softcap=1.0)}) == 2
    with pytest.raises(FrozenInstanceError):
        PLAIN.scale = 1.0  # type: ignore[misc]
