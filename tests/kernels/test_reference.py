"""The definition: each field of a spec against the formula written out by hand, row by row."""

import math

import pytest
import torch
from torch import Tensor

from attnopt.kernels.reference.kernel import KERNEL
from attnopt.mask import Causal, First, KeyPadding, Opaque, Window
from attnopt.spec import AttentionSpec, Decay, EmptyRow, Heads, Normaliser


def operands(
    sq: int = 5, sk: int = 6, heads: int = 2, kv_heads: int = 2, d: int = 3, dv: int = 4
) -> dict[str, Tensor]:
    make = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    return {"q": make(2, heads, sq, d), "k": make(2, kv_heads, sk, d), "v": make(2, kv_heads, sk, dv)}


def softmax_row(scores: dict[int, float], v: Tensor) -> Tensor:
    """The mean of the values of the visible keys, weighted by exp of their scores."""
    top = max(scores.values())
    weights = {j: math.exp(s - top) for j, s in scores.items()}
    return sum((w * v[j] for j, w in weights.items()), torch.zeros(v.shape[-1], dtype=v.dtype)) / sum(
        weights.values()
    )


def test_softmax_attention_is_the_weighted_mean_of_the_visible_values() -> None:
    held = operands()
    spec = AttentionSpec("softmax", scale=0.7, mask=Causal() & (Window(2) | First(1)), softcap=1.5)
    out = KERNEL.run(spec, held)
    for b, h, i in [(0, 0, 0), (1, 1, 4), (0, 1, 3)]:
        q, k, v = held["q"][b, h, i], held["k"][b, h], held["v"][b, h]
        seen = [j for j in range(6) if j <= i and (j > i - 2 or j < 1)]
        scores = {j: 1.5 * math.tanh(0.7 * float(q @ k[j]) / 1.5) for j in seen}
        torch.testing.assert_close(out[b, h, i], softmax_row(scores, v))


def test_query_heads_share_consecutive_kv_heads() -> None:
    held = operands(heads=6, kv_heads=2)
    shared = KERNEL.run(AttentionSpec("softmax", heads=Heads(3)), held)
    for h in range(6):
        alone = {
            "q": held["q"][:, h : h + 1],
            "k": held["k"][:, h // 3 :][:, :1],
            "v": held["v"][:, h // 3 :][:, :1],
        }
        assert torch.equal(shared[:, h : h + 1], KERNEL.run(AttentionSpec("softmax"), alone))


def test_biases_add_up() -> None:
    held = operands() | {"bias": torch.randn(2, 5, 6).double(), "bias1": torch.randn(6).double()}
    both = KERNEL.run(AttentionSpec("softmax", bias=("bias", "bias1")), held)
    held["bias"] = held["bias"] + held["bias1"]
    torch.testing.assert_close(both, KERNEL.run(AttentionSpec("softmax", bias=("bias",)), held))


@pytest.mark.parametrize(
    ("meaning", "value"), [(EmptyRow.NAN, math.nan), (EmptyRow.ZERO, 0.0), (EmptyRow.UNIFORM, None)]
)
def test_a_row_without_keys_has_the_meaning_of_the_spec(meaning: EmptyRow, value: float | None) -> None:
    held = operands() | {"padding": torch.tensor([[False] * 6, [True] * 6])}
    out = KERNEL.run(AttentionSpec("softmax", mask=KeyPadding("padding"), empty_row=meaning), held)
    wanted = (
        held["v"][0].mean(-2, keepdim=True).expand(2, 5, 4)
        if value is None
        else torch.full((2, 5, 4), value).double()
    )
    torch.testing.assert_close(out[0], wanted, equal_nan=True)
    torch.testing.assert_close(out[1], KERNEL.run(AttentionSpec("softmax"), held)[1])


def test_a_sink_logit_joins_each_denominator() -> None:
    held = operands() | {"sink_logits": torch.tensor([0.3, -1.0]).double()}
    with_sink = KERNEL.run(AttentionSpec("softmax", sink_logits=True), held)
    logits = held["q"] @ held["k"].mT
    share = torch.sigmoid(logits.logsumexp(-1) - held["sink_logits"][None, :, None])
    torch.testing.assert_close(with_sink, KERNEL.run(AttentionSpec("softmax"), held) * share[..., None])


def test_a_sink_logit_of_each_query_joins_its_denominator() -> None:
    held = operands() | {"sink_logits": torch.randn(2, 2, 5).double()}
    with_sink = KERNEL.run(AttentionSpec("softmax", sink_logits=True, sink_per_query=True), held)
    logits = held["q"] @ held["k"].mT
    share = torch.sigmoid(logits.logsumexp(-1) - held["sink_logits"])
    torch.testing.assert_close(with_sink, KERNEL.run(AttentionSpec("softmax"), held) * share[..., None])


@pytest.mark.parametrize("decay", list(Decay))
def test_linear_attention_is_its_recurrence(decay: Decay) -> None:
    held = operands(sq=6)
    rates = {
        Decay.NONE: torch.zeros(2, 2, 6),
        Decay.PER_HEAD: torch.tensor([0.5, 0.1]),
        Decay.PER_TOKEN: torch.rand(2, 2, 6),
    }
    log_decay = -rates[decay].double()
    spec = AttentionSpec("linear", scale=0.5, mask=Causal(), decay=decay)
    out = KERNEL.run(spec, held | ({} if decay is Decay.NONE else {"log_decay": log_decay}))
    per_token = log_decay[None, :, None].expand(2, 2, 6) if decay is Decay.PER_HEAD else log_decay
    state = torch.zeros(2, 2, 3, 4, dtype=torch.float64)
    for t in range(6):
        state = (
            state * per_token[:, :, t].exp()[..., None, None]
            + held["k"][:, :, t, :, None] * held["v"][:, :, t, None]
        )
        torch.testing.assert_close(out[:, :, t], 0.5 * (held["q"][:, :, t, None] @ state)[:, :, 0])


@pytest.mark.parametrize("normaliser", [Normaliser(), Normaliser(eps=0.1), Normaliser(floor=1.0)])
def test_the_normaliser_divides_by_the_sum_of_weights(normaliser: Normaliser) -> None:
    held = {name: x.abs() for name, x in operands().items()}
    out = KERNEL.run(AttentionSpec("linear", normaliser=normaliser), held)
    weights = held["q"] @ held["k"].mT
    total = weights.sum(-1, keepdim=True)
    below = total.clamp_min(1.0) if normaliser.floor else total + normaliser.eps
    torch.testing.assert_close(out, weights @ held["v"] / below)


def test_an_opaque_mask_is_read_as_it_is() -> None:
    seen = torch.rand(2, 1, 5, 6) < 0.6
    seen[..., 0] = True
    held = operands() | {"mask": seen}
    out = KERNEL.run(AttentionSpec("softmax", mask=Opaque("mask")), held)
    logits = (held["q"] @ held["k"].mT).masked_fill(~seen, -math.inf)
    torch.testing.assert_close(out, logits.softmax(-1) @ held["v"])
