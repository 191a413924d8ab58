"""Many queries at once are the same as one decoding step for each."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attnopt.errors import OptionError, ShapeError
from attnopt.kernels.sparq import rows as module
from attnopt.kernels.sparq.plain import sparq_reference
from attnopt.kernels.sparq.rows import sparq_rows


def operands(batch: int, kv_heads: int, group: int, length: int, seed: int, d: int = 8) -> tuple[Tensor, ...]:
    torch.manual_seed(seed)
    heads = (kv_heads * group, kv_heads, kv_heads)
    return tuple(torch.randn(batch, h, length, w).double() for h, w in zip(heads, (d, d, 6), strict=True))


def by_steps(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, **choices: Any) -> Tensor:
    """The definition, one step after the other."""
    steps = [
        sparq_reference(
            q[:, :, i : i + 1],
            k[:, :, : i + 1],
            v[:, :, : i + 1],
            key_padding=None if kept is None else kept[:, : i + 1],
            **choices,
        )
        for i in range(q.shape[2])
    ]
    return torch.cat(steps, dim=2)


@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    length=st.integers(1, 14),
    rank=st.integers(1, 10),
    topk=st.integers(1, 16),
    local=st.integers(0, 4),
    padding=st.sampled_from([0.0, 0.4]),
    mean_value=st.sampled_from([None, True, False]),
    block=st.sampled_from([1, 3, 2**25]),
    seed=st.integers(0, 99),
)
def test_each_row_is_the_step_of_its_query(
    batch: int,
    kv_heads: int,
    group: int,
    length: int,
    rank: int,
    topk: int,
    local: int,
    padding: float,
    mean_value: bool | None,
    block: int,
    seed: int,
) -> None:
    q, k, v = operands(batch, kv_heads, group, length, seed)
    kept = torch.rand(batch, length) >= padding if padding else None
    if kept is not None:
        k[~kept[:, None].expand(k.shape[:3])] = torch.nan
        v[~kept[:, None].expand(v.shape[:3])] = torch.inf
    choices = {"rank": rank, "topk": topk, "local": min(local, topk), "scale": 0.4, "mean_value": mean_value}
    before, module.MOST_SCORES = module.MOST_SCORES, block * batch * kv_heads * group * length
    try:
        found = sparq_rows(q, k, v, key_padding=kept, **choices)
    finally:
        module.MOST_SCORES = before
    torch.testing.assert_close(found, by_steps(q, k, v, kept, **choices), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
def test_the_prompt_is_exact_and_what_follows_is_not_changed_by_it(padded: bool) -> None:
    q, k, v = operands(2, 2, 2, 20, seed=3)
    kept = torch.ones(2, 20, dtype=torch.bool)
    kept[1, :4] = False
    kept = kept if padded else None
    choices: dict[str, Any] = {"rank": 3, "topk": 5, "local": 1, "key_padding": kept}
    found, all_steps = sparq_rows(q, k, v, first=12, **choices), sparq_rows(q, k, v, **choices)
    dense = sparq_rows(q, k, v, rank=8, topk=20, local=0, key_padding=kept)
    torch.testing.assert_close(found[:, :, :12], dense[:, :, :12])
    torch.testing.assert_close(found[:, :, 12:], all_steps[:, :, 12:])
    assert not torch.allclose(all_steps[:, :, :12], dense[:, :, :12])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_with_every_position_chosen_it_is_dense_attention(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in operands(1, 2, 2, 30, seed=1))
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    found = sparq_rows(q, k, v, rank=1, topk=30, local=0, mean_value=True)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted)


def test_what_cannot_be_is_refused() -> None:
    q, k, v = operands(1, 2, 2, 5, seed=1)
    with pytest.raises(ShapeError, match="a query for each key"):
        sparq_rows(q[:, :, 1:], k, v)
    with pytest.raises(ShapeError, match="one floating dtype"):
        sparq_rows(q.float(), k, v)
    with pytest.raises(OptionError, match="first=6"):
        sparq_rows(q, k, v, first=6)
