"""Chunks and segments: what each means, written out by hand; no band states them."""

import pytest
import torch
from torch import Tensor

from attnopt.mask import BOTTOM_RIGHT, TOP_LEFT, Causal, Length, Mask, band
from attnopt.mask_blocks import Chunk, Segments

OPERANDS = {
    "query_ids": torch.tensor([[0, 0, 1], [2, 1, 1]]),
    "key_ids": torch.tensor([[0, 1, 1, 0], [1, 1, 2, 0]]),
}


def rows(text: str) -> Tensor:
    """One row for each word, 1 where visible."""
    return torch.tensor([[c == "1" for c in word] for word in text.split()])


@pytest.mark.parametrize(
    ("mask", "picture"),
    [
        (Chunk(2), "11000 11000 00110 00110 00001"),
        (Chunk(2, side="until"), "11000 11000 11110 11110 11111"),
        (Chunk(2, side="since"), "11111 11111 00111 00111 00001"),
        (Chunk(2, query=Length(1)), "11000 00110 00110 00001 00001"),
        (Chunk(2, key=Length(1)), "10000 10000 01100 01100 00011"),
        (Chunk(2, query=Length(-1)), "00000 11000 11000 00110 00110"),
        (Causal() & Chunk(2), "10000 11000 00100 00110 00001"),
    ],
    ids=str,
)
def test_chunks_are_the_picture_of_them(mask: Mask, picture: str) -> None:
    assert mask.dense(5, 5).tolist() == rows(picture).tolist()


def test_chunks_may_be_counted_from_the_last_key() -> None:
    assert Chunk(2, query=BOTTOM_RIGHT).dense(2, 5).tolist() == rows("00110 00001").tolist()


def test_a_query_sees_the_keys_with_its_number() -> None:
    seen = Segments("query_ids", "key_ids").dense(3, 4, OPERANDS)
    assert seen[0, 0].tolist() == rows("1001 1001 0110").tolist()
    assert seen[1, 0].tolist() == rows("0010 1100 1100").tolist()


def test_segments_name_both_tensors_and_can_be_renamed() -> None:
    mask = (Causal() & Segments("query_ids", "key_ids")).renamed({"query_ids": "q1", "key_ids": "k1"})
    assert mask.operand_names() == ("q1", "k1")


@pytest.mark.parametrize("mask", [Chunk(4), Segments("query_ids", "key_ids")], ids=str)
def test_no_band_states_what_compares_for_equality(mask: Mask) -> None:
    assert band(mask) is None
    assert band(Causal() & mask) is None


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (Chunk(4), "chunk(4)"),
        (Chunk(4, side="until"), "until chunk(4)"),
        (Chunk(4, BOTTOM_RIGHT), "chunk(4, i Sk-Sq)"),
        (Chunk(4, TOP_LEFT, Length(3), "since"), "since chunk(4, j 3)"),
        (Segments("query_ids", "key_ids") & Causal(), "causal & segments"),
    ],
)
def test_a_block_mask_prints_in_a_few_words(mask: Mask, text: str) -> None:
    assert str(mask) == text
