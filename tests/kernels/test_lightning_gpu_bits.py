"""Every configuration that the choice of tiles can return runs a hundred times to the same bits: a race would show."""

from dataclasses import replace

import pytest
import torch
from lightning_cases import Case, make_case
from lightning_judging import attend, backward, forward, results
from torch import Tensor

from attnopt.kernels.lightning.triton_tiles import PIECES, WIDEST_WITH_TERMS, Tiles, _programs, chunk_rows

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
RUNS = 100
#: One width for each size of tile that a kernel can be compiled for.
WIDTHS = (16, 32, 64, 128, 256)
#: A length that is ragged and has several segments, and for each short form of chunk one that takes it.
LENGTHS = {64: 777, 32: 31, 16: 13}


def shipped(dtype: torch.dtype, dx: int, dz: int, chunk: int) -> list[Tiles]:
    """What `choose_tiles` chooses among, in one pass and in segments (of one sequence of 777 rows)."""
    segments = (1, 3) if chunk == chunk_rows(777, max(dx, dz), dtype) else (1,)
    return [
        replace(tiles, segments=n, pieces=PIECES)
        for tiles in _programs(dx, dz, dtype, chunk)
        for n in segments
    ]


def case_of(dtype: torch.dtype, length: int, d: int, dv: int, decay: str = "head") -> Case:
    sizes = {"batch": 1, "kv_heads": 48, "share": 1, "d": d, "dv": dv, "scale": 1 / max(d, dv)}
    with torch.device(DEVICE):
        return make_case(length, decay=decay, rate=0.02, **sizes).in_rounded(dtype)


def by_name(case: Case, tiles: Tiles, *, both: bool) -> dict[str, Tensor]:
    """`both` directions; the gradient of a decay per token where the tiles are those of a sweep that leaves it."""
    out, state = forward(case, tiles)
    terms = case.log_decay.dim() == 3 and tiles.columns <= WIDEST_WITH_TERMS
    grads = backward(case, tiles, with_log_decay=terms) if both else {}
    return {"out": out, "state": state, **grads}


def differing(case: Case, tiles: Tiles, *, both: bool) -> list[str]:
    """Which results are not finite, or not the same bits in every run."""
    first = by_name(case, tiles, both=both)
    wrong = {f"{name} is not finite" for name, x in first.items() if not x.isfinite().all()}
    for _ in range(RUNS - 1):
        again = by_name(case, tiles, both=both)
        wrong |= {f"{name} differs" for name, x in again.items() if not torch.equal(x, first[name])}
    return [f"{tiles} {name}" for name in sorted(wrong)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", ["head", "token"])
@pytest.mark.parametrize("width", WIDTHS)
def test_every_shipped_configuration_gives_the_same_bits_each_time(dtype, width: int, decay: str) -> None:
    """Square widths: forward and all gradients; at one width also the short chunks of short sequences."""
    found = []
    for length in LENGTHS.values() if width == 64 else [LENGTHS[64]]:
        chunk, case = chunk_rows(length, width, dtype), case_of(dtype, length, width, width, decay)
        for tiles in shipped(dtype, width, width, chunk):
            found += differing(case, tiles, both=True)
    assert found == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
def test_unequal_widths_give_the_same_bits_each_time(dtype, d: int) -> None:
    found = []
    for dv in (16, 64, 256):
        chunk = chunk_rows(777, max(d, dv), dtype)
        case = case_of(dtype, 777, d, dv)
        for tiles in shipped(dtype, d, dv, chunk):
            found += differing(case, tiles, both=False)
    assert found == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "heads", "length"), [(1, 4, 8192), (4, 16, 2048), (1, 600, 300)])
def test_the_choice_itself_gives_the_same_bits_each_time(dtype, batch: int, heads: int, length: int) -> None:
    """Sizes at which several programs share a multiprocessor."""
    with torch.device(DEVICE):
        case = make_case(
            length, batch=batch, kv_heads=heads, share=1, d=128, dv=128, scale=1 / 128, rate=0.02
        )
    low = case.in_rounded(dtype)
    first = results(attend, low)
    for _ in range(RUNS - 1):
        again = results(attend, low)
        assert [name for name, x in first.items() if not torch.equal(again[name], x)] == []
