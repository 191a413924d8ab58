"""Models rewritten with softmax="streaming" give the logits of StreamingLLM token by token, however they are run."""

from typing import Any

import pytest
import torch
from streaming_models import (
    BLOOM,
    CLOSE,
    GROUPED,
    LENGTH,
    ROTARY,
    SINKS,
    STREAMING,
    WINDOW,
    build,
    published,
    tokens,
    turned,
)
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.models.bloom import modeling_bloom

import attnopt


def rewritten(model: nn.Module, ids: Tensor) -> nn.Module:
    """Exported and rewritten; every attention has to be."""
    program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
    program, report = attnopt.rewrite(program, STREAMING)
    assert [(s.verdict, s.kernel, s.exact) for s in report.attention] == [
        ("rewritten", "streaming", False)
    ] * 2
    assert all((site.approximation_error or 0) > 1e-3 for site in report.attention)
    return program.module()


@pytest.mark.parametrize("kind", ROTARY)
def test_a_prefill_is_the_published_algorithm(kind: str) -> None:
    config, neighbours = ROTARY[kind]
    model, ids = build(kind, **config), tokens()
    with torch.no_grad():
        got = rewritten(model, ids)(ids, use_cache=False).logits
        full = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, published(model, ids, neighbours=neighbours), **CLOSE)
    few = SINKS + WINDOW
    torch.testing.assert_close(got[:, :few], full[:, :few], **CLOSE)
    assert float((got - full)[:, few:].abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("cuts", "dynamic"),
    [((24,), False), ((9, 13, 1, 1), False), ((9, 12, 1, 1, 1), True), ((5, *(1,) * 19), True)],
)
def test_any_split_into_prefill_and_decode_gives_the_same(cuts: tuple[int, ...], *, dynamic: bool) -> None:
    model, ids = build("llama", **GROUPED), tokens()
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64), torch.no_grad():
        run = torch.compile(
            model, backend="attnopt", options={**STREAMING, "inner": "eager"}, dynamic=dynamic
        )
        cache = DynamicCache(config=model.config)
        pieces = [run(piece, past_key_values=cache).logits for piece in ids.split(cuts, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), published(model, ids, neighbours=False), **CLOSE)
    assert {site.kernel for site in attnopt.reports()[-1].sites} == {"streaming"}


def test_dynamic_lengths_are_one_program() -> None:
    model = build("llama", **GROUPED)
    torch._dynamo.reset()
    run = torch.compile(model, backend="attnopt", options={**STREAMING, "inner": "eager"}, dynamic=True)
    for length in (24, 17, 11):
        with torch.no_grad():
            got = run(tokens(length), use_cache=False).logits
        torch.testing.assert_close(got, published(model, tokens(length), neighbours=False), **CLOSE)


def test_an_exported_program_of_any_length_stays_one() -> None:
    """Texts shorter than the sinks, too: no length is baked in."""
    model = build("llama", **GROUPED)
    lengths = {"input_ids": {1: torch.export.Dim("tokens", min=2, max=100)}, "use_cache": None}
    program = torch.export.export(
        model, (), {"input_ids": tokens(), "use_cache": False}, dynamic_shapes=lengths, strict=False
    )
    run = attnopt.rewrite(program, STREAMING)[0].module()
    for length in (2, 3, 6, 7, 8, 24):
        ids = tokens(length)
        with torch.no_grad():
            got = run(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(got, published(model, ids, neighbours=False), **CLOSE)


def test_alibi_counts_distances_to_sinks_from_the_place_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = build("bloom", **BLOOM), tokens()
    with torch.no_grad():
        got = rewritten(model, ids)(ids, use_cache=False).logits
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    place = torch.where(j < SINKS, j, j - (i - i.clamp(max=SINKS + WINDOW - 1)))
    seen = (j <= i) & ((j < SINKS) | (j > i - WINDOW))
    built = model.transformer.build_alibi_tensor

    def by_place(mask: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
        slopes = built(mask, heads, dtype)[:, 0, 1]
        return slopes[:, None, None] * place.to(dtype)

    monkeypatch.setattr(model.transformer, "build_alibi_tensor", by_place)
    least = torch.zeros(1, 1, LENGTH, LENGTH, dtype=torch.float64).masked_fill(~seen, -1e30)
    monkeypatch.setattr(modeling_bloom, "create_causal_mask", lambda **_: least)
    with torch.no_grad():
        wanted = model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_training_has_the_gradients_of_the_published_loss() -> None:
    """Through the masked form: the same rows in parallel, keys at their true places and sinks met by a second query."""
    model, ids = build("llama", **GROUPED).train(), tokens()
    torch._dynamo.reset()
    run = torch.compile(model, backend="attnopt", options={**STREAMING, "inner": "aot_eager"})
    run(ids, labels=ids, use_cache=False).loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    rewritten_loss(model, ids).backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-6)


def rewritten_loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The loss by a plain attention that is told which keys each query meets, and from which place."""
    rates = model.model.rotary_emb.inv_freq.double()
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    seen = (j <= i) & ((j < SINKS) | (j > i - WINDOW))

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> Any:
        back = torch.arange(LENGTH).clamp(max=SINKS + WINDOW - 1) - torch.arange(LENGTH)
        far = turned(q, back, rates, neighbours=False)
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = torch.where(j < SINKS, far @ k.mT, q @ k.mT) * scaling
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2), None

    AttentionInterface.register("places", attention)
    model.set_attn_implementation("places")
    loss: Tensor = model(ids, labels=ids, use_cache=False).loss
    model.set_attn_implementation("eager")
    return loss


def test_what_moves_tokens_to_experts_is_no_position() -> None:
    model, ids = build("mixtral", **GROUPED, num_local_experts=4).float(), tokens()
    report = attnopt.explain(model, ids, use_cache=False, options=STREAMING)
    assert [site.exact for site in report.attention] == [False, False]


def test_learned_positions_are_refused() -> None:
    config = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "vocab_size": 64}
    model, ids = build("gpt2", **config), tokens()
    report = attnopt.explain(model, ids, use_cache=False, options=STREAMING)
    assert [site.exact for site in report.sites] == [True, True]
    assert all("positions may enter its queries, keys or values otherwise" in s.reason for s in report.sites)


def test_layers_with_a_window_of_their_own_stay_exact() -> None:
    model, ids = build("gemma2", **GROUPED, head_dim=8, sliding_window=6), tokens()
    report = attnopt.explain(model, ids, use_cache=False, options=STREAMING)
    assert [site.exact for site in report.sites] == [True, False]
    assert "it has a window already" in report.sites[0].reason
