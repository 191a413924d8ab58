"""Streaming as a kernel: which sites it serves, and that it gives them the meaning that the reference gives."""

from dataclasses import replace

import pytest
import torch
from oracle import assert_same
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.kernels.reference.kernel import KERNEL as REFERENCE
from attnopt.kernels.sdpa.kernel import KERNEL as SDPA
from attnopt.kernels.streaming.kernel import KERNEL
from attnopt.mask import BOTTOM_RIGHT, FULL, Causal, First, KeyPadding, Mask, Opaque, Window
from attnopt.rule import Kernel, SiteMeta, TensorMeta
from attnopt.spec import AttentionSpec, Decay, EmptyRow, Heads, unread_fields

#: Roundings of fp64 by which two ways of summing the same row may differ.
ROUNDINGS = 50.0

STREAM = Causal() & (First(2) | Window(7))
MASKS = [
    FULL,
    Causal(),
    Causal(BOTTOM_RIGHT),
    Causal() & Window(5),
    STREAM,
    STREAM & KeyPadding("keep"),
    Causal(BOTTOM_RIGHT) & (First(3) | Window(4, BOTTOM_RIGHT)),
    Causal() | First(6),
    KeyPadding("keep"),
    Opaque("seen"),
    Opaque("seen") & Opaque("row") & Causal(),
]


def operands(spec: AttentionSpec, sq: int = 30, sk: int = 33) -> dict[str, Tensor]:
    torch.manual_seed(0)
    known = {
        "q": torch.randn(2, 4, sq, 16),
        "k": torch.randn(2, 4 // spec.heads.share, sk, 16),
        "v": torch.randn(2, 4 // spec.heads.share, sk, 12),
        "keep": torch.rand(2, sk) < 0.7,
        "seen": torch.rand(2, 1, sq, sk) < 0.7,
        "row": torch.rand(1, 4, 1, sk) < 0.9,
        "bias": torch.randn(2, 4, sq, sk),
        "slope": torch.randn(4, 1, sk),
        "sink_logits": torch.randn(4),
    }
    return {
        name: x.double() if x.is_floating_point() else x
        for name, x in known.items()
        if name in spec.operand_names()
    }


def site(spec: AttentionSpec, *, gradient: bool = False, **changes: Tensor) -> SiteMeta:
    found = {**operands(spec), **changes}
    return SiteMeta(
        spec, {n: TensorMeta(tuple(x.shape), x.dtype, x.device) for n, x in found.items()}, gradient
    )


def long_site(mask: Mask, n: int) -> SiteMeta:
    device = torch.device("cpu")
    meta = {name: TensorMeta((1, 8, n, 64), torch.float32, device) for name in "qkv"}
    seen = {"seen": TensorMeta((1, 1, n, n), torch.bool, device)} if mask.operand_names() else {}
    return SiteMeta(AttentionSpec("softmax", mask=mask), meta | seen)


@pytest.mark.parametrize("meaning", list(EmptyRow))
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_it_means_what_the_reference_means(mask: Mask, meaning: EmptyRow) -> None:
    spec = AttentionSpec("softmax", scale=0.3, mask=mask, heads=Heads(2), empty_row=meaning)
    given = operands(spec)
    assert KERNEL.refuse(site(spec)) is None
    got, want = KERNEL.run(spec, given), REFERENCE.run(spec, given)
    if meaning is EmptyRow.NEVER:  # which speaks of rows that see a key
        seen = mask.dense(30, 33, given).expand(2, 4, 30, 33).any(-1)
        got, want = got[seen], want[seen]
    assert_same(got, want, factor=ROUNDINGS)


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": ("bias",)},
        {"bias": ("bias", "slope")},
        {"softcap": 3.0},
        {"sink_logits": True},
        {"softcap": 3.0, "bias": ("slope",), "sink_logits": True, "heads": Heads(4)},
    ],
    ids=str,
)
def test_everything_that_is_added_counts(changes: dict[str, object]) -> None:
    spec = replace(AttentionSpec("softmax", scale=0.3, mask=STREAM), **changes)
    given = operands(spec)
    assert unread_fields(spec, KERNEL.reads) == ()
    assert_same(KERNEL.run(spec, given), REFERENCE.run(spec, given), factor=ROUNDINGS)


@pytest.mark.parametrize(
    ("changes", "tensors", "reason"),
    [
        ({"mask": Window(3)}, {}, "not a band"),
        ({"mask": Window(3) | Opaque("seen")}, {}, "not a band"),
        ({}, {"v": torch.zeros(2, 4, 33, 16)}, "dtype"),
        ({}, dict.fromkeys("qkv", torch.zeros(2, 4, 33, 16, dtype=torch.int64)), "dtype"),
        ({}, dict.fromkeys("qkv", torch.zeros(2, 4, 33, 320)), "wanted 1 to 256"),
        ({"sink_logits": True, "empty_row": EmptyRow.UNIFORM}, {}, "not the mean"),
    ],
    ids=str,
)
def test_it_says_why_it_refuses(changes: dict[str, object], tensors: dict[str, Tensor], reason: str) -> None:
    refusal = KERNEL.refuse(site(replace(AttentionSpec("softmax"), **changes), **tensors))
    assert refusal is not None
    assert reason in refusal


def test_running_what_was_refused_is_an_error() -> None:
    spec = AttentionSpec("softmax", mask=Window(3) | Opaque("seen"))
    with pytest.raises(UnsupportedError, match="not a band"):
        KERNEL.run(spec, operands(spec))


def test_fields_of_other_families_are_not_read() -> None:
    spec = AttentionSpec("softmax", decay=Decay.PER_HEAD, dropout=0.1)
    assert unread_fields(spec, KERNEL.reads) == ("decay", "dropout")


def test_it_keeps_to_the_protocol() -> None:
    assert isinstance(KERNEL, Kernel)
    assert KERNEL.exact


@pytest.mark.parametrize(
    ("mask", "cheaper"),
    [
        (FULL, SDPA),
        (Causal(), SDPA),
        (Opaque("seen"), SDPA),
        (Causal() & Window(256), KERNEL),
        (STREAM, KERNEL),
    ],
    ids=lambda x: getattr(x, "name", str(x)),
)
def test_the_estimate_prefers_it_where_blocks_are_skipped(mask: Mask, cheaper: Kernel) -> None:
    there = long_site(mask, 4096)
    assert min((KERNEL, SDPA), key=lambda kernel: kernel.cost(there).effort) is cheaper


def test_the_estimate_grows_with_the_window_not_with_the_square() -> None:
    short, long = (KERNEL.cost(long_site(STREAM, n)).effort for n in (4096, 8192))
    assert 1.9 < long / short < 2.1
