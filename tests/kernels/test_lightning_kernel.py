"""The lightning kernel as attnopt sees it: which specs it serves, that it computes them, and which it refuses."""

from collections.abc import Mapping

import pytest
import torch
from oracle import assert_same
from torch import Tensor

from attnopt.errors import UnsupportedError
from attnopt.kernels.lightning.kernel import KERNEL
from attnopt.kernels.reference.kernel import KERNEL as REFERENCE
from attnopt.mask import BOTTOM_RIGHT, FULL, TOP_LEFT, Causal, KeyPadding, Length, Opaque, Window
from attnopt.rule import Kernel, SiteMeta, TensorMeta
from attnopt.spec import AttentionSpec, Decay, Heads, Normaliser, unread_fields

CAUSAL = Causal(TOP_LEFT)
PADDING = KeyPadding("padding")


def linear(**fields: object) -> AttentionSpec:
    return AttentionSpec("linear", **fields)


SPECS = [
    linear(),
    linear(mask=CAUSAL, scale=0.5),
    linear(mask=Causal(BOTTOM_RIGHT), decay=Decay.PER_HEAD),
    linear(mask=CAUSAL, decay=Decay.PER_TOKEN, heads=Heads(2)),
    linear(mask=CAUSAL, normaliser=Normaliser(eps=1e-6)),
    linear(mask=FULL, normaliser=Normaliser(floor=1.0), heads=Heads(4), scale=0.1),
    linear(mask=CAUSAL, decay=Decay.PER_HEAD, normaliser=Normaliser(floor=2.0), heads=Heads(2)),
    linear(mask=CAUSAL, decay=Decay.PER_TOKEN, normaliser=Normaliser(floor=0.5, signed=True)),
    linear(mask=CAUSAL, decay=Decay.PER_HEAD, normaliser=Normaliser(floor=1.0, detached=True)),
    linear(mask=CAUSAL & PADDING, decay=Decay.PER_HEAD),
    linear(mask=PADDING, normaliser=Normaliser(eps=0.1)),
]


def operands(spec: AttentionSpec, sq: int = 70, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    batch, heads, sk, d, dv = 2, 4, 70, 6, 5
    kv_heads = heads // spec.heads.share
    decay_shape = (heads,) if spec.decay is Decay.PER_HEAD else (batch, heads, sk)
    everything = {
        "q": torch.rand(batch, heads, sq, d).to(dtype),
        "k": torch.rand(batch, kv_heads, sk, d).to(dtype),
        "v": torch.randn(batch, kv_heads, sk, dv).to(dtype),
        "log_decay": -torch.rand(decay_shape),
        "padding": torch.arange(sk) < torch.tensor([[sk], [50]]),
        "dense": torch.rand(batch, 1, sq, sk) < 0.5,
    }
    return {name: everything[name] for name in spec.operand_names()}


def site(spec: AttentionSpec, given: Mapping[str, Tensor]) -> SiteMeta:
    metas = {name: TensorMeta(tuple(x.shape), x.dtype, x.device) for name, x in given.items()}
    return SiteMeta(spec, metas, gradient=True)


def test_it_is_a_kernel() -> None:
    assert isinstance(KERNEL, Kernel)
    assert (KERNEL.name, KERNEL.family, KERNEL.exact) == ("lightning", "linear", True)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_computes_what_the_reference_computes(spec: AttentionSpec) -> None:
    given = operands(spec)
    assert KERNEL.refuse(site(spec, given)) is None
    assert unread_fields(spec, KERNEL.reads) == ()
    want = REFERENCE.run(
        spec, {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    )
    torch.testing.assert_close(KERNEL.run(spec, given), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_as_good_as_eager(spec: AttentionSpec, dtype: torch.dtype) -> None:
    given = operands(spec, dtype=dtype)
    exact = REFERENCE.run(
        spec, {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    )
    out = KERNEL.run(spec, given)
    assert out.dtype == dtype
    assert_same(out, exact, REFERENCE.run(spec, given))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_its_gradients_are_those_of_the_reference(spec: AttentionSpec) -> None:
    given = operands(spec)
    leaves = [x.requires_grad_() for x in given.values() if x.is_floating_point()]
    arriving = torch.randn(2, 4, 70, 5, dtype=torch.float64)
    got = torch.autograd.grad(KERNEL.run(spec, given), leaves, arriving)
    torch.testing.assert_close(got, torch.autograd.grad(REFERENCE.run(spec, given), leaves, arriving))


@pytest.mark.parametrize(
    ("spec", "sq", "reason"),
    [
        (linear(decay=Decay.PER_HEAD), 70, "without causal order"),
        (linear(mask=CAUSAL), 69, "not the diagonal of a square"),
        (linear(mask=Causal(Length(1))), 70, "not the diagonal"),
        (linear(mask=Causal(TOP_LEFT) & Window(8)), 70, "wanted full or causal"),
        (linear(mask=Opaque("dense")), 70, "wanted full or causal"),
        (linear(mask=CAUSAL & Opaque("dense")), 70, "wanted full or causal"),
    ],
)
def test_it_says_why_it_refuses(spec: AttentionSpec, sq: int, reason: str) -> None:
    assert reason in (KERNEL.refuse(site(spec, operands(spec, sq))) or "")


def test_it_refuses_mixed_dtypes() -> None:
    given = operands(linear())
    given["v"] = given["v"].float()
    assert "wanted one floating dtype" in (KERNEL.refuse(site(linear(), given)) or "")


def test_a_mask_that_slipped_through_is_not_ignored() -> None:
    spec = linear(mask=Opaque("dense"))
    with pytest.raises(UnsupportedError, match="wanted full or causal"):
        KERNEL.run(spec, operands(spec))


def test_its_cost_grows_with_the_length_not_its_square() -> None:
    def effort(length: int) -> float:
        metas = {name: TensorMeta((1, 8, length, 64), torch.bfloat16, torch.device("cpu")) for name in "qkv"}
        return KERNEL.cost(SiteMeta(linear(mask=CAUSAL), metas)).effort

    assert effort(2 * 4096) == pytest.approx(2 * effort(4096))
