"""torch's own attention states each spec that the kernel takes exactly: row by row against the reference in fp64."""

from collections.abc import Mapping
from dataclasses import replace

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


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("per_query", [False, True], ids=["per head", "per query"])
@given(
    sq=st.integers(1, 9), sk=st.integers(1, 9), share=st.sampled_from([1, 3]), biased=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_learned_sinks_are_stated_exactly(
    mask: Mask, sq: int, sk: int, share: int, biased: bool, dtype: torch.dtype, *, per_query: bool
) -> None:
    held = operands(sq, sk, share, dtype)
    held["sink_logits"] = torch.randn((2, 2 * share, sq) if per_query else (2 * share,)).to(dtype)
    spec = AttentionSpec(
        "softmax", 0.3, Heads(share), mask, EmptyRow.ZERO, bias=("bias",) if biased else (),
        sink_logits=True, sink_per_query=per_query,
    )  # fmt: skip
    exact = REFERENCE.run(spec, widened(held))
    assert_same(KERNEL.run(spec, held), exact, REFERENCE.run(spec, held))


@pytest.mark.parametrize("mask", [FULL, Causal(), Opaque("mask")], ids=str)
@pytest.mark.parametrize("scale", [0.3, -0.5, 0.0])
def test_gradients_reach_the_sinks(mask: Mask, scale: float) -> None:
    held = operands(6, 6, 1, torch.float64) | {"sink_logits": torch.randn(2).double()}
    spec = AttentionSpec("softmax", scale, mask=mask, empty_row=EmptyRow.ZERO, sink_logits=True)
    names = ("q", "k", "v", "sink_logits")
    found = []
    for kernel in (KERNEL, REFERENCE):
        leaves = [held[name].clone().requires_grad_() for name in names]
        out = kernel.run(spec, held | dict(zip(names, leaves, strict=True)))
        found.append(torch.autograd.grad(out.sin().sum(), leaves))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_dropout_leaves_out_weights_and_keeps_the_mean() -> None:
    held = operands(6, 9, 1, torch.float32)
    held["v"] = torch.eye(9).expand(2, 2, 9, 9)  # the output is the weights
    out = KERNEL.run(AttentionSpec("softmax", 0.3, dropout=0.5), held)
    weights = REFERENCE.run(AttentionSpec("softmax", 0.3), held)
    kept = out != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(out[kept], 2 * weights[kept])


def test_sinks_cost_a_dense_mask_and_copies_of_the_keys() -> None:
    metas = {name: TensorMeta((1, 4, 256, 64), torch.float32, torch.device("cpu")) for name in "qkv"}
    metas["sink_logits"] = TensorMeta((4,), torch.float32, torch.device("cpu"))
    plain, sinks = (
        KERNEL.cost(SiteMeta(AttentionSpec("softmax", mask=Causal(), sink_logits=there), metas))
        for there in (False, True)
    )
    assert sinks.bytes > plain.bytes
    assert sinks.flops == 2 * plain.flops


def test_the_mean_of_all_values_under_dropout_is_refused() -> None:
    metas = {name: TensorMeta((1, 4, 8, 8), torch.float32, torch.device("cpu")) for name in "qkv"}
    spec = AttentionSpec("softmax", mask=KeyPadding("padding"), empty_row=EmptyRow.UNIFORM, dropout=0.1)
    assert "with dropout" in (KERNEL.refuse(SiteMeta(spec, metas)) or "")


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


def biased_gradients(kernel: object, dtype: torch.dtype, bias: Tensor, names: str) -> list[Tensor]:
    made = operands(4, 6, 1, torch.float64) | {"bias": bias}
    held = {name: made[name].to(dtype) for name in (*"qkv", "bias")}
    leaves = [held[name].requires_grad_() for name in names.split()]
    out = kernel.run(AttentionSpec("softmax", 0.3, bias=("bias",)), held)
    return list(torch.autograd.grad(out.sin().sum(), leaves))


@pytest.mark.parametrize("far", [-1e9, -1e5, 1e9, 0.0])
@pytest.mark.parametrize("names", ["q k v bias", "q k v"])
def test_a_row_of_large_numbers_keeps_its_gradients(far: float, names: str) -> None:
    bias = torch.randn(2, 2, 4, 6).round()
    bias[:, :, 1] = far
    bias[:, :, 2, :3] = -torch.inf
    want = biased_gradients(REFERENCE, torch.float64, bias, names)
    got = biased_gradients(KERNEL, torch.float32, bias.clone(), names)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


def test_a_bias_from_data_is_refused_where_gradients_would_come_of_absorbed_sums() -> None:
    metas = {name: TensorMeta((1, 4, 8, 8), torch.float32, torch.device("cpu")) for name in (*"qkv", "bias")}
    site = SiteMeta(AttentionSpec("softmax", bias=("bias",)), metas, gradient=True)
    assert "lowest numbers" in (KERNEL.refuse(site) or "")
    assert KERNEL.refuse(replace(site, gradient=False)) is None
    assert KERNEL.refuse(replace(site, library=True)) is None
    assert KERNEL.refuse(replace(site, spec=replace(site.spec, dropout=0.1))) is None
