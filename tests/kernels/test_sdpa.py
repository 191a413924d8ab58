"""torch's own attention states each spec that the kernel takes exactly: row by row against the reference in fp64."""

from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_same
from torch import Tensor

from attnopt.kernels.reference.kernel import KERNEL as REFERENCE
from attnopt.kernels.sdpa.kernel import KERNEL
from attnopt.mask import BOTTOM_RIGHT, FULL, Causal, First, KeyPadding, Mask, Opaque, Window
from attnopt.rule import SiteMeta, TensorMeta
from attnopt.spec import AttentionSpec, EmptyRow, Heads

MASKS = [
    FULL,
    Causal(),
    Causal(BOTTOM_RIGHT),
    Causal() & Window(3),
    Causal() & (Window(2) | First(2)),
    Causal() & KeyPadding("padding"),
    Opaque("mask"),
]


def operands(sq: int, sk: int, share: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sq * 100 + sk)
    make = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    return {
        "q": make(2, 2 * share, sq, 8),
        "k": make(2, 2, sk, 8),
        "v": make(2, 2, sk, 5),
        "bias": make(1, 1, sq, sk),
        "padding": torch.rand(2, sk, generator=generator) < 0.6,
        "mask": torch.rand(2, 1, sq, sk, generator=generator) < 0.5,
    }


def widened(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.double() if x.is_floating_point() else x for name, x in held.items()}


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("empty_row", [EmptyRow.NAN, EmptyRow.ZERO, EmptyRow.UNIFORM], ids=lambda e: e.value)
@given(
    sq=st.integers(1, 9), sk=st.integers(1, 9), share=st.sampled_from([1, 3]), biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_every_mask_and_meaning_of_an_empty_row_is_stated_exactly(
    mask: Mask, empty_row: EmptyRow, sq: int, sk: int, share: int, biased: bool, dtype: torch.dtype
) -> None:
    held = operands(sq, sk, share, dtype)
    spec = AttentionSpec("softmax", 0.3, Heads(share), mask, empty_row, bias=("bias",) if biased else ())
    exact = REFERENCE.run(spec, widened(held))
    assert_same(KERNEL.run(spec, held), exact, REFERENCE.run(spec, held))


@pytest.mark.parametrize("mask", [FULL, Causal(), Opaque("mask")], ids=str)
def test_gradients_are_those_of_the_definition(mask: Mask) -> None:
    held = operands(6, 6, 1, torch.float64)
    held["mask"][..., 0] = True
    spec = AttentionSpec("softmax", 0.3, mask=mask)
    found = []
    for kernel in (KERNEL, REFERENCE):
        leaves = [held[name].clone().requires_grad_() for name in "qkv"]
        out = kernel.run(spec, held | dict(zip("qkv", leaves, strict=True)))
        found.append(torch.autograd.grad(out.sin().sum(), leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_a_plain_causal_mask_costs_half_and_needs_no_tensor() -> None:
    metas = {name: TensorMeta((1, 4, 256, 64), torch.float32, torch.device("cpu")) for name in "qkv"}
    full, causal = (KERNEL.cost(SiteMeta(AttentionSpec("softmax", mask=m), metas)) for m in (FULL, Causal()))
    assert causal.flops * 2 == full.flops
    assert KERNEL.cost(SiteMeta(AttentionSpec("softmax", mask=Opaque("mask")), metas)).bytes > full.bytes


def test_integers_are_refused() -> None:
    metas = {name: TensorMeta((1, 4, 8, 8), torch.int64, torch.device("cpu")) for name in "qkv"}
    assert (
        KERNEL.refuse(SiteMeta(AttentionSpec("softmax"), metas)) == "dtype torch.int64 is not floating point"
    )
