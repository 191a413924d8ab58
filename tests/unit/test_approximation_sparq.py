"""The rule that says whether a decoding step over a cache with one key layout would gain anything from SparQ."""

import pytest
import torch

from attnopt.approximation_sparq import PAYS, dense_bytes, refusal, sparq_bytes
from attnopt.options import Options
from attnopt.rule import SiteMeta, TensorMeta
from attnopt.spec import AttentionSpec

OPTIONS = Options(softmax="sparq")


def decoding(sk: int, kv_heads: int = 8, device: str = "cuda", batch: int = 1) -> SiteMeta:
    """32 query heads of 128 channels in bfloat16."""
    shapes = {"q": (batch, 32, 1, 128), "k": (batch, kv_heads, sk, 128), "v": (batch, kv_heads, sk, 128)}
    metas = {n: TensorMeta(shape, torch.bfloat16, torch.device(device)) for n, shape in shapes.items()}
    return SiteMeta(AttentionSpec("softmax"), metas)


@pytest.mark.parametrize(
    ("meta", "pays"),
    [
        (decoding(131_072), True),
        (decoding(4_096), False),  # the launches cost more than is saved
        (decoding(4_096, batch=64), True),
        (decoding(131_072, kv_heads=32), False),  # the mean value reads all values
        (decoding(4_096, device="cpu"), True),
        (decoding(256, device="cpu"), False),  # half of the positions are chosen
    ],
)
def test_it_pays_where_values_are_left_out_and_the_cache_is_long(meta: SiteMeta, *, pays: bool) -> None:
    assert (refusal(meta, OPTIONS, "given") == "") is pays
    assert pays is (sparq_bytes(meta, OPTIONS) <= PAYS * dense_bytes(meta))


def test_it_never_pays_where_each_step_copies_the_cache() -> None:
    reason = refusal(decoding(10**6), OPTIONS, "copied")
    assert "copies the whole cache" in reason
    assert "attnopt.caches.sparq" in reason


def test_dense_attention_reads_every_key_and_value_once() -> None:
    assert dense_bytes(decoding(1000)) == 8 * 1000 * 256 * 2


def test_a_few_channels_touch_nearly_every_sector_of_a_row() -> None:
    meta = decoding(100_000, device="cpu")
    few, all_channels = (sparq_bytes(meta, Options(softmax="sparq", rank=rank)) for rank in (32, 128))
    assert 0.97 * all_channels < few <= all_channels
