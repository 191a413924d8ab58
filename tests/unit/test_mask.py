"""The algebra of masks: what each means, written out by hand, and the form that kernels take."""

import pytest
import torch
from torch import Tensor

from attnopt.mask import (
    BOTTOM_RIGHT,
    FULL,
    TOP_LEFT,
    And,
    Band,
    Causal,
    First,
    KeyPadding,
    Length,
    Mask,
    Opaque,
    Or,
    Window,
    band,
)

KEEP = torch.tensor([[True, False, True, True], [False, True, True, False]])
SEEN = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
OPERANDS = {"padding": KEEP, "mask": SEEN}


def rows(text: str) -> Tensor:
    """One row for each word, 1 where visible."""
    return torch.tensor([[c == "1" for c in word] for word in text.split()])


@pytest.mark.parametrize(
    ("mask", "picture"),
    [
        (FULL, "1111 1111 1111"),
        (Causal(), "1000 1100 1110"),
        (Causal(BOTTOM_RIGHT), "1100 1110 1111"),
        (Causal(Length(-1)), "0000 1000 1100"),
        (Window(1), "1111 0111 0011"),
        (Window(2, BOTTOM_RIGHT), "1111 0111 0011"),
        (First(2), "1100 1100 1100"),
        (Causal() & Window(2), "1000 1100 0110"),
        (Causal() & (First(1) | Window(1)), "1000 1100 1010"),
        (Causal() | First(2), "1100 1100 1110"),
    ],
    ids=str,
)
def test_a_mask_is_the_picture_of_it(mask: Mask, picture: str) -> None:
    assert mask.dense(3, 4).tolist() == rows(picture).tolist()


def test_tensors_give_a_mask_its_batch() -> None:
    padded = (Causal() & KeyPadding("padding")).dense(3, 4, OPERANDS)
    assert padded.shape == (2, 1, 3, 4)
    assert torch.equal(padded[:, 0], rows("1000 1100 1110") & KEEP[:, None])
    assert torch.equal(Opaque("mask").dense(3, 4, OPERANDS), SEEN)


def test_full_is_the_identity_of_and_and_absorbs_or() -> None:
    assert FULL & Causal() == Causal() == Causal() & FULL
    assert FULL | Causal() == FULL == Causal() | FULL
    assert FULL & FULL == FULL


def test_and_and_or_know_neither_order_nor_repetition() -> None:
    a, b, c = Causal(), Window(3), KeyPadding("padding")
    assert a & a == a == a | a
    assert (a & b) & c == c & (b & a) & a
    assert (a | b) | c == c | (b | a)
    assert isinstance(a & b, And)
    assert isinstance(a | b, Or)


@pytest.mark.parametrize(
    ("length", "text", "at"),
    [
        (TOP_LEFT, "0", 0), (BOTTOM_RIGHT, "Sk-Sq", 4), (Length(3), "3", 3), (Length(-2), "-2", -2),
        (Length(1, 2, -3), "-3Sk+2Sq+1", -14),
    ],
)  # fmt: skip
def test_a_length_is_printed_and_computed_from_the_shapes(length: Length, text: str, at: int) -> None:
    assert (str(length), length.at(3, 7)) == (text, at)


def test_a_mask_names_its_tensors_once() -> None:
    mask = KeyPadding("padding") & (Opaque("mask") | Causal()) & (Opaque("mask") | First(2))
    assert sorted(mask.operand_names()) == ["mask", "padding"]


@pytest.mark.parametrize(
    "mask",
    [
        FULL, Causal(), Causal(BOTTOM_RIGHT), Causal() & Window(2), Causal() & (First(1) | Window(1)),
        Causal() | First(2), Causal(Length(1)) & KeyPadding("padding"),
        Causal(BOTTOM_RIGHT) & Window(2, BOTTOM_RIGHT) & KeyPadding("padding") & Opaque("mask"),
        (Causal() | First(3)) & KeyPadding("padding"),
    ],
    ids=str,
)  # fmt: skip
def test_a_band_is_the_mask_in_other_words(mask: Mask) -> None:
    form = band(mask)
    assert form is not None
    assert torch.equal(written_out(form), mask.dense(3, 4, OPERANDS).expand(2, 1, 3, 4))


@pytest.mark.parametrize(
    "mask",
    [
        Window(2),
        First(2),
        Causal() & Causal(Length(1)),
        Causal() | Opaque("mask"),
        Causal() & Window(2, Length(1)),
    ],
    ids=str,
)
def test_what_is_no_band_has_none(mask: Mask) -> None:
    assert band(mask) is None


def written_out(form: Band) -> Tensor:
    """The formula in the documentation of Band, for 3 queries and 4 keys."""
    i, j = torch.arange(3)[:, None], torch.arange(4)[None, :]
    seen = torch.ones(3, 4, dtype=torch.bool)
    at = (form.offset or TOP_LEFT).at(3, 4)
    if form.window is not None:
        seen = (j > i + at - form.window) | (j < form.sinks)
    if form.offset is not None:
        seen = seen & (j <= i + at)
    seen = (seen | (j < form.prefix)).expand(2, 1, 3, 4)
    if form.padding:
        seen = seen & OPERANDS[form.padding][:, None, None]
    for name in form.opaque:
        seen = seen & OPERANDS[name]
    return seen
