"""Rotations: a group, exact far away, and the pairs of features that a model means."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnopt.caches import Rotary
from attnopt.errors import OptionError, ShapeError

WHOLE = st.integers(-(2**30), 2**30)


@given(WHOLE, WHOLE, st.sampled_from(["halves", "neighbours"]))
def test_turning_twice_is_turning_by_the_sum(a: int, b: int, pairs: str) -> None:
    rotary, x = Rotary.of(6, 100.0, pairs), torch.randn(1, 2, 1, 8, dtype=torch.float64)
    both = rotary.moved(rotary.turned(x, torch.tensor([[a]])), torch.tensor([[b]]))
    assert torch.allclose(both, rotary.turned(x, torch.tensor([[a + b]])), atol=1e-6)


@given(st.integers(0, 2**40), st.integers(0, 1000), st.sampled_from([torch.float64, torch.float32]))
def test_scores_know_distances_only(far: int, distance: int, dtype: torch.dtype) -> None:
    rotary = Rotary.of(8, 10_000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=dtype).unbind()
    at = torch.tensor([[far + distance]]), torch.tensor([[far]])
    score = (rotary.turned(q, at[0]) * rotary.turned(k, at[1])).sum()
    near = (rotary.turned(q, torch.tensor([[distance]])) * k).sum()
    assert abs(float(score - near)) < 1e-5 + 2.0**-50 * far


@pytest.mark.parametrize("pairs", ["halves", "neighbours"])
def test_pairs_are_complex_numbers(pairs: str) -> None:
    rotary = Rotary(torch.tensor([1.0, 0.1, 0.01]), pairs, gain=1.5)
    x, t = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.arange(8).view(2, 4)
    out = rotary.turned(x, t)
    turn = torch.exp(1j * t[:, None, :, None] * torch.tensor([1.0, 0.1, 0.01]).double()) * 1.5
    a, b = {"halves": (slice(0, 3), slice(3, 6)), "neighbours": (slice(0, 6, 2), slice(1, 6, 2))}[pairs]
    z = (x[..., a] + 1j * x[..., b]) * turn
    assert torch.allclose(out[..., a], z.real)
    assert torch.allclose(out[..., b], z.imag)
    assert torch.equal(out[..., 6:], x[..., 6:])


def test_one_table_serves_each_device_and_dtype() -> None:
    rotary = Rotary.of(8).on(torch.device("cpu"))
    assert rotary.frequencies.dtype == torch.float64
    x = torch.randn(1, 1, 2, 8, dtype=torch.bfloat16)
    assert rotary.turned(x, torch.arange(2)[None]).dtype == torch.bfloat16


def test_tables_that_cannot_be() -> None:
    with pytest.raises(ShapeError, match="frequencies is"):
        Rotary(torch.ones(2, 2))
    with pytest.raises(ShapeError, match="int64"):
        Rotary(torch.ones(2, dtype=torch.int64))
    with pytest.raises(OptionError, match="pairs="):
        Rotary(torch.ones(2), "thirds")
