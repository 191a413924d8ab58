"""Models rewritten with softmax="streaming" give the logits of StreamingLLM token by token, however they are run."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.bloom import modeling_bloom

import attnopt

SINKS, WINDOW, LENGTH = 2, 5, 24
STREAMING: dict[str, Any] = {"softmax": "streaming", "sinks": SINKS, "window": WINDOW}

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
#: Models with rotations, and whether neighbouring features turn together.
ROTARY: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": (GROUPED, False),
    "gpt_neox": ({**SMALL, "rotary_pct": 0.5}, False),
    "phi": ({**GROUPED, "partial_rotary_factor": 0.5}, False),
    "cohere": (GROUPED, True),
    "glm": ({**GROUPED, "head_dim": 8}, True),
    "gemma": ({**GROUPED, "head_dim": 8}, False),
    "qwen3": ({**GROUPED, "head_dim": 8}, False),
}
BLOOM = {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64}
#: The models form cos and sin in single precision: so exact are they with themselves.
CLOSE: dict[str, float] = {"rtol": 2e-5, "atol": 2e-5}


def build(kind: str, **config: Any) -> PreTrainedModel:
    """In fp64, with attention that is far from uniform."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **config), attn_implementation="eager"
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if any(part in name for part in ("q_proj.w", "k_proj.w", "query_key_value.w")):
                weight.mul_(8)
    return model.eval().double()


def tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def published(model: PreTrainedModel, ids: Tensor, *, neighbours: bool) -> Tensor:
    """(1, N, vocabulary) by arXiv 2309.17453, section 3.2: keys are cached before rotation, and the kept ones rotated
    by their place in the cache, at every token. The model is given position 0, which is before rotation.
    """
    kept: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    rates = next(m.inv_freq for m in model.modules() if hasattr(m, "inv_freq")).double()

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> Any:
        row = kept[module.layer_idx]
        row.append((k, v))
        keys, values = (
            torch.cat(part, 2).repeat_interleave(q.shape[1] // k.shape[1], 1)
            for part in zip(*row, strict=True)
        )
        places = torch.arange(len(row))
        q, keys = (
            turned(x, at, rates, neighbours=neighbours) for x, at in ((q, places[-1:]), (keys, places))
        )
        out = torch.softmax(scaling * q @ keys.mT, -1) @ values
        if len(row) == SINKS + WINDOW:
            del row[SINKS]
        return out.transpose(1, 2), None

    AttentionInterface.register("published", attention)
    model.set_attn_implementation("published")
    at_zero = torch.zeros(1, 1, dtype=torch.long)
    rows = [model(i.view(1, 1), position_ids=at_zero, use_cache=False).logits for i in ids[0]]
    model.set_attn_implementation("eager")
    return torch.cat(rows, 1)


def turned(x: Tensor, places: Tensor, rates: Tensor, *, neighbours: bool) -> Tensor:
    width = 2 * len(rates)
    angle = places[:, None] * rates
    pairs = (x[..., 0:width:2], x[..., 1:width:2]) if neighbours else x[..., :width].chunk(2, -1)
    z = torch.complex(*(part.contiguous() for part in pairs)) * torch.polar(torch.ones_like(angle), angle)
    both = torch.stack([z.real, z.imag], -1).flatten(-2) if neighbours else torch.cat([z.real, z.imag], -1)
    return torch.cat([both, x[..., width:]], -1)


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
