"""The peer in benchmarks/streaming_gpu.py must be FlexAttention at its best: its own block mask, whole blocks apart."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

LISTS = (
    ("kv_num_blocks", "kv_indices"),
    ("full_kv_num_blocks", "full_kv_indices"),
    ("q_num_blocks", "q_indices"),
    ("full_q_num_blocks", "full_q_indices"),
)


def listed(blocks: BlockMask, count: str, indices: str) -> list[Tensor]:
    """The blocks of each row, without what follows them."""
    counts, rows = getattr(blocks, count)[0, 0], getattr(blocks, indices)[0, 0]
    return [row[:n] for n, row in zip(counts, rows, strict=True)]


@pytest.mark.parametrize(
    ("length", "window"), [(1024, 256), (1024, 200), (2048, 1), (1024, 129), (4096, 1024)]
)
def test_blocks_are_those_that_create_block_mask_finds(
    benchmark: Callable[[str], ModuleType], length: int, window: int
) -> None:
    ours = benchmark("streaming_gpu").flex_blocks(length, window, "cpu")
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu")
    assert ours.BLOCK_SIZE == theirs.BLOCK_SIZE
    assert ours.seq_lengths == theirs.seq_lengths
    for names in LISTS:
        for mine, wanted in zip(listed(ours, *names), listed(theirs, *names), strict=True):
            assert torch.equal(mine, wanted)
