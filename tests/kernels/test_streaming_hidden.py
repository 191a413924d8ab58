"""Hidden keys whose logit is a finite number: they weigh what a softmax over all keys gives them."""

from typing import Any

import pytest
import torch
from oracle import assert_same
from torch import Tensor

from attnopt.kernels.reference.kernel import KERNEL as REFERENCE
from attnopt.kernels.streaming.kernel import KERNEL
from attnopt.mask import BOTTOM_RIGHT, Causal, KeyPadding, Length, Mask, Opaque, Window
from attnopt.rule import Kernel, SiteMeta, TensorMeta
from attnopt.spec import AttentionSpec, Heads, Stream, unread_fields

B, H, HKV, D, DV = 2, 4, 2, 8, 6
SCALE = 0.3
MASKS = [
    Causal(),
    Causal(BOTTOM_RIGHT),
    Causal(Length(-3)),
    Causal(Length(40)),
    Causal() & Window(5),
    KeyPadding("keep"),
    Causal() & KeyPadding("keep"),
    Opaque("seen"),
]


def operands(spec: AttentionSpec, sq: int, sk: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    torch.manual_seed(0)
    known = {
        "q": torch.randn(B, H, sq, D, dtype=dtype),
        "k": torch.randn(B, HKV, sk, D, dtype=dtype),
        "v": torch.randn(B, HKV, sk, DV, dtype=dtype),
        "keep": torch.rand(B, sk) < 0.7,
        "seen": torch.rand(B, 1, sq, sk) < 0.4,
        "bias": torch.randn(B, H, sq, sk, dtype=dtype),
        "sink_logits": torch.randn(H, dtype=dtype),
        "slopes": torch.rand(H, dtype=dtype),
    }
    known["seen"][0, 0, 0] = False  # a row that sees nothing
    return {name: known[name] for name in spec.operand_names()}


def filled(mask: Mask, logit: float, **changes: Any) -> AttentionSpec:
    return AttentionSpec("softmax", SCALE, Heads(H // HKV), mask, hidden_logit=logit, **changes)


@pytest.mark.parametrize(("sq", "sk"), [(13, 13), (5, 17), (17, 5), (1, 9)])
@pytest.mark.parametrize("logit", [-10000.0, -3.0, 0.0, 4.0])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_output_and_gradients_are_those_of_scores_filled_with_a_number(
    mask: Mask, logit: float, sq: int, sk: int
) -> None:
    spec = filled(mask, logit)
    got, want = (
        {n: x.clone().requires_grad_(x.is_floating_point()) for n, x in operands(spec, sq, sk).items()}
        for _ in range(2)
    )
    scores = SCALE * (want["q"] @ want["k"].repeat_interleave(2, 1).mT)
    hidden = ~mask.dense(sq, sk, want).expand_as(scores)
    eager = scores.masked_fill(hidden, logit).softmax(-1) @ want["v"].repeat_interleave(2, 1)
    assert_same(REFERENCE.run(spec, want), eager, factor=50.0)
    o = KERNEL.run(spec, got)
    assert_same(o, eager, factor=50.0)
    pull = torch.randn_like(o)
    found = torch.autograd.grad(o, [got[n] for n in "qkv"], pull)
    wanted = torch.autograd.grad(eager, [want[n] for n in "qkv"], pull)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mask", [Causal(), Opaque("seen")], ids=str)
@pytest.mark.parametrize("pushed", [0.0, -9990.0, -10004.0])
def test_scores_as_low_as_the_number_share_the_row_with_it(mask: Mask, pushed: float) -> None:
    spec = filled(mask, -10000.0, bias=("bias",))
    given = operands(spec, 9, 9)
    given["bias"] += pushed
    assert_same(
        KERNEL.run(spec, given), REFERENCE.run(spec, given), factor=1e6
    )  # logits of 1e4 have such roundings


@pytest.mark.parametrize("logit", [-10000.0, -1.0])
@pytest.mark.parametrize(
    "changes",
    [{"bias": ("bias",)}, {"softcap": 3.0}, {"sink_logits": True}, {"softcap": 2.0, "sink_logits": True}],
    ids=str,
)
def test_what_else_the_scores_are_made_of_counts(changes: dict[str, Any], logit: float) -> None:
    spec = filled(Causal() & KeyPadding("keep"), logit, **changes)
    given = operands(spec, 11, 11)
    assert unread_fields(spec, KERNEL.reads) == ()
    assert_same(KERNEL.run(spec, given), REFERENCE.run(spec, given), factor=50.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_it_is_as_close_to_fp64_as_eager_is(mask: Mask, dtype: torch.dtype) -> None:
    spec = filled(mask, -2.0)
    given = operands(spec, 33, 33, dtype)
    exact = {n: x.double() if x.is_floating_point() else x for n, x in given.items()}
    assert_same(KERNEL.run(spec, given), REFERENCE.run(spec, exact), REFERENCE.run(spec, given))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("logit", [-10000.0, -2.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_outputs_and_gradients_are_as_close_as_eager(
    mask: Mask, dtype: torch.dtype, logit: float, device: str
) -> None:
    spec = filled(mask, logit)
    held = {n: x.to(device) for n, x in operands(spec, 200, 200, dtype).items()}
    exact = {n: x.double() if x.is_floating_point() else x for n, x in held.items()}
    pull = torch.randn(B, H, 200, DV, device=device, dtype=dtype)
    got, eager, want = (
        _differentiated(kernel, spec, given, pull)
        for kernel, given in ((KERNEL, held), (REFERENCE, held), (REFERENCE, exact))
    )
    assert_same(got[0], want[0], eager[0])
    assert_same(got[3], want[3], eager[3], factor=3.0, what="gradient of v")
    # Those of q and k by the whole tensor: the backward starts from outputs rounded to their dtype, by which rows are
    # off whose gradients of the scores almost cancel (plain streaming attention has such rows, too).
    for a, b, c in zip(got[1:3], want[1:3], eager[1:3], strict=True):
        allowed = 3.0 * (c.double() - b).norm() + torch.finfo(dtype).eps * b.norm()
        assert (a.double() - b).norm() <= allowed


def _differentiated(
    kernel: Kernel, spec: AttentionSpec, given: dict[str, Tensor], pull: Tensor
) -> tuple[Tensor, ...]:
    leaves = {
        n: x.detach().clone().requires_grad_(True) if x.is_floating_point() else x for n, x in given.items()
    }
    out = kernel.run(spec, leaves)
    assert isinstance(out, Tensor)
    return (out, *torch.autograd.grad(out, [leaves[n] for n in "qkv"], pull.to(out.dtype)))


def test_where_the_hidden_keys_weigh_nothing_the_visible_ones_are_untouched() -> None:
    spec = filled(Causal(), -10000.0)
    given = operands(spec, 40, 40, torch.float32)
    plain = KERNEL.run(AttentionSpec("softmax", SCALE, Heads(2), Causal()), given)
    assert torch.equal(KERNEL.run(spec, given), plain)


def test_dropping_keys_beside_a_number_that_weighs_is_refused() -> None:
    spec = filled(Causal(), -100.0, stream=Stream(2, 4))
    meta = {n: TensorMeta(tuple(x.shape), x.dtype, x.device) for n, x in operands(spec, 9, 9).items()}
    assert "may weigh" in str(KERNEL.refuse(SiteMeta(spec, meta)))
