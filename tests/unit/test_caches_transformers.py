"""Models of transformers generate over a streaming cache exactly as the paper's algorithm does, token by token."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attnopt.caches import streaming
from attnopt.errors import AttnoptError, OptionError, UnsupportedError

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
}


def a_model(kind: str = "llama", dtype: torch.dtype = torch.float64, **more: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    config = CONFIG_MAPPING[kind](**{**SMALL, **more})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # from small random numbers every attention is nearly uniform
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(12)
    return model.to(dtype)


def tokens(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 97, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def published(
    model: PreTrainedModel, ids: Tensor, sinks: int, most: int, unturned: frozenset[int] = frozenset()
) -> Tensor:
    """(N, vocabulary): the logits of each token of one text by arXiv 2309.17453, section 3.2, one token at a time.

    Keys are cached before rotation; at every step the kept ones are rotated by their place in the cache. The model
    runs with an attention function that is given keys at position 0, which is before rotation, and rotates itself,
    but for the layers `unturned`, which know no positions.
    """
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.model.layers]

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any
    ) -> Any:
        row = kept[module.layer_idx]
        row.append((k, v))
        keys, values = (torch.cat([token[n] for token in row], 2).repeat_interleave(2, 1) for n in (0, 1))
        places = torch.arange(len(row))
        if module.layer_idx not in unturned:
            q, keys = turned(model, q, places[-1:]), turned(model, keys, places)
        out = torch.softmax(scaling * q @ keys.mT, -1) @ values
        if len(row) > most - 1:
            del row[sinks]
        return out.transpose(1, 2), None

    AttentionInterface.register("published", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("published")
    at_zero = torch.zeros(1, 1, dtype=torch.long)
    rows = [model(input_ids=i.view(1, 1), position_ids=at_zero, use_cache=False).logits[0, 0] for i in ids]
    model.set_attn_implementation(before)
    return torch.stack(rows)


def turned(model: PreTrainedModel, x: Tensor, places: Tensor) -> Tensor:
    angle = places[:, None] * model.model.rotary_emb.inv_freq.double()
    turn = torch.polar(torch.ones_like(angle), angle)
    rotated = 2 * angle.shape[1]
    z = torch.complex(*x[..., :rotated].chunk(2, -1)) * turn
    return torch.cat([z.real, z.imag, x[..., rotated:]], -1)


@torch.no_grad()
def logits(model: PreTrainedModel, cache: Any, ids: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """Of one text, fed in pieces."""
    return torch.cat([model(piece[None], past_key_values=cache).logits[0] for piece in ids.split(cuts)])


@pytest.mark.parametrize("counting", ["within", "beside"])
@pytest.mark.parametrize("cuts", [(40,), (1,) * 40, (3, 1, 1, 20, 1, 14)])
def test_a_llama_gives_the_logits_of_the_published_algorithm(cuts: tuple[int, ...], counting: str) -> None:
    model, ids = a_model(), tokens(1, 40)[0]
    with streaming(model, sinks=3, window=9, counting=counting) as cache:
        found = logits(model, cache, ids, cuts)
    # The model forms cos and sin in fp32: so exact is it with itself, and no more.
    assert torch.allclose(found, published(model, ids, 3, 12 + (counting == "beside")), atol=2e-5)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_does_so_in_fp32_and_on_the_gpu(device: str) -> None:
    model, ids = a_model(), tokens(1, 40)[0]
    wanted = published(model, ids, 3, 12)
    with streaming(model.to(device, torch.float32), sinks=3, window=9) as cache:
        found = logits(model, cache, ids.to(device), (11, 1, 1, 26, 1)).cpu()
    assert torch.allclose(found.double(), wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("qwen2", {}),
        ("qwen3", {"head_dim": 8}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                    "rope_theta": 1e4,
                }
            },
        ),
    ],
)
def test_other_models_do_as_well(kind: str, more: dict[str, Any]) -> None:
    model, ids = a_model(kind, **more), tokens(1, 30)[0]
    with streaming(model, sinks=2, window=7) as cache:
        found = logits(model, cache, ids, (11, 1, 1, 17))
    assert torch.allclose(found, published(model, ids, 2, 9), atol=2e-5)


def test_layers_without_positions_are_found_and_left_alone() -> None:
    model, ids = a_model("smollm3", no_rope_layers=[0, 1]), tokens(1, 30)[0]
    with streaming(model, sinks=2, window=7) as cache:
        assert [layer.rotary is None for layer in cache.layers] == [True, False]
        found = logits(model, cache, ids, (11, 1, 1, 17))
    assert torch.allclose(found, published(model, ids, 2, 9, frozenset({0})), atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("cohere", {"tie_word_embeddings": False}),
        ("glm", {"head_dim": 8}),
        ("smollm3", {}),
        ("phi", {}),
        ("stablelm", {}),
    ],
)
def test_every_way_to_rotate_is_measured_and_short_texts_are_untouched(
    kind: str, more: dict[str, Any]
) -> None:
    """Until something is dropped a stream is plain attention; after that any split gives the same."""
    model, ids = a_model(kind, **more), tokens(1, 30)[0]
    with torch.no_grad():
        plain = model(ids[None, :9]).logits[0]
    with streaming(model, sinks=2, window=7) as cache:
        found = logits(model, cache, ids, (9, 1, 1, 19))
        assert torch.allclose(logits(model, cache.fresh(), ids, (1,) * 30), found, atol=1e-8)
    assert torch.allclose(found[:9], plain, atol=2e-5)


def test_generate_gives_the_tokens_of_the_published_algorithm() -> None:
    model, prompt = a_model(), tokens(1, 14)
    with streaming(model, sinks=2, window=6) as cache:
        found = model.generate(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False)[0]
        assert cache.get_seq_length() == 33
        assert cache.layers[0].ring.keys.shape == (1, 2, 8, 8)
    scores = published(model, found[:-1], 2, 8)
    assert torch.equal(scores[13:].argmax(-1), found[14:])


def test_a_left_padded_batch_is_each_text_alone() -> None:
    model = a_model()
    long, short = tokens(1, 14)[0], tokens(1, 5, seed=7)[0]
    batch = torch.stack([long, torch.cat([torch.zeros(9, dtype=torch.long), short])])
    mask = torch.ones_like(batch)
    mask[1, :9] = 0
    options = {"max_new_tokens": 12, "do_sample": False}
    with streaming(model, sinks=2, window=6) as cache:
        both = model.generate(batch, attention_mask=mask, past_key_values=cache, **options)
        alone = model.generate(short[None], past_key_values=cache.fresh(), **options)
    assert torch.equal(both[1, 14:], alone[0, 5:])
    assert torch.equal(published(model, both[0, :-1], 2, 8)[13:].argmax(-1), both[0, 14:])


def test_beams_are_those_of_a_full_cache_while_nothing_is_dropped() -> None:
    model, prompt = a_model(), tokens(2, 6)
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(prompt, **options)
    with streaming(model, sinks=2, window=20) as cache:
        assert torch.equal(model.generate(prompt, past_key_values=cache, **options), wanted)


def test_beams_past_the_first_dropped_key_are_reordered_with_their_keys() -> None:
    model, prompt = a_model(), tokens(1, 10)
    with streaming(model, sinks=2, window=5) as cache:
        best = model.generate(
            prompt, past_key_values=cache, num_beams=4, max_new_tokens=9, do_sample=False,
            return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        )  # fmt: skip
    text = best.sequences[0]
    rows = torch.log_softmax(published(model, text[:-1], 2, 7), -1)
    score = rows[9:].gather(1, text[10:, None]).sum().float()
    assert torch.allclose(score, best.sequences_scores[0], atol=1e-4)


def test_a_conversation_goes_on_where_it_was_and_takes_words_back() -> None:
    model, ids = a_model(), tokens(1, 40)[0]
    with streaming(model, sinks=2, window=6, rollback=4) as cache:
        logits(model, cache, ids[:20], (20,))
        logits(model, cache, tokens(1, 5, seed=9)[0], (5,))
        cache.crop(-5)
        state = cache.state_dict()
        first = logits(model, cache, ids[20:], (1, 4, 15))
        other = cache.fresh()
        other.load_state_dict(state)
        assert torch.equal(logits(model, other, ids[20:], (1, 4, 15)), first)
        with pytest.raises(UnsupportedError, match="cannot be taken back"):
            cache.crop(-6)
        cache.reset()
        assert torch.equal(logits(model, cache, ids[:9], (9,)), logits(model, cache.fresh(), ids[:9], (9,)))
    assert torch.allclose(first, published(model, ids, 2, 8)[20:], atol=2e-5)


@pytest.mark.parametrize("seed", range(3))
def test_assisted_generation_takes_back_what_was_guessed_wrong(seed: int) -> None:
    model, helper, prompt = a_model(), a_model(num_hidden_layers=1), tokens(1, 12, seed)
    options = {"max_new_tokens": 16, "do_sample": False}
    with streaming(model, sinks=2, window=6, rollback=24) as cache:
        alone = model.generate(prompt, past_key_values=cache, **options)
        found = model.generate(prompt, past_key_values=cache.fresh(), assistant_model=helper, **options)
    assert torch.equal(found, alone)


def test_far_positions_are_as_exact_as_near_ones() -> None:
    """2^30 tokens later, over the same kept tokens, the model says the same."""
    model, ids = a_model(dtype=torch.float32), tokens(1, 30)[0]
    start = 2**30 + 1
    with streaming(model, sinks=2, window=6) as cache, torch.no_grad():
        wanted = logits(model, cache, ids, (8, 22))
        far = cache.fresh()
        logits(model, far, ids[:8], (8,))
        for layer in far.layers:
            layer.ring.seen += start
            layer.ring.top += start
        at = torch.arange(8, 30)[None] + start
        found = model(ids[None, 8:], past_key_values=far, position_ids=at).logits[0]
    # After a window in each of two layers, nothing that is seen comes from before the leap, but for the sinks.
    assert torch.allclose(found[12:], wanted[20:], atol=1e-4)


def test_the_model_is_as_before_afterwards() -> None:
    model, ids = a_model(), tokens(1, 9)
    with torch.no_grad():
        before = model(ids).logits
        with streaming(model) as cache:
            model(ids, past_key_values=cache)
        assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert not model.model.rotary_emb._forward_hooks


def test_memory_is_flat() -> None:
    model, ids = a_model(), tokens(2, 60)
    with streaming(model, sinks=2, window=6) as cache, torch.no_grad():
        model(ids[:, :3], past_key_values=cache)
        held = [(layer.ring.keys.data_ptr(), layer.ring.values.numel()) for layer in cache.layers]
        for n in range(3, 60):
            model(ids[:, n : n + 1], past_key_values=cache)
        assert held == [(layer.ring.keys.data_ptr(), layer.ring.values.numel()) for layer in cache.layers]


# ---- what is refused ----

DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
LONG = {
    "rope_parameters": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
        "factor": 4.0,
    }
}


@pytest.mark.parametrize(
    ("kind", "more", "match"),
    [
        ("llama", DYNAMIC, "depend on the length"),
        ("llama", LONG, "depend on the length"),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, "learned or added positions"),
        ("opt", {"ffn_dim": 32, "word_embed_proj_dim": 32}, "learned or added positions"),
        ("mistral", {"sliding_window": 8}, "masks more than the future"),
        ("gemma2", {"head_dim": 8}, "masks more than the future"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "does not go through transformers' AttentionInterface"),
        ("mamba", {}, "of 2 layers 0 attend"),
    ],
)
def test_what_cannot_be_exact_is_refused(kind: str, more: dict[str, Any], match: str) -> None:
    model = a_model(kind, torch.float32, **more)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedError, match=match), streaming(model):
        pass
    assert model.config._attn_implementation == before


def test_a_cache_without_its_attention_raises_instead_of_answering() -> None:
    model, ids = a_model(), tokens(1, 9)
    with streaming(model) as cache:
        pass
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        cache.reset()
        with pytest.raises(UnsupportedError, match="attnopt_streaming"), torch.no_grad():
            model(ids, past_key_values=cache)


def test_the_attention_without_its_cache_raises_instead_of_answering() -> None:
    model, ids = a_model(), tokens(1, 9)
    with streaming(model), torch.no_grad():
        for past in (None, DynamicCache(config=model.config)):
            with pytest.raises(UnsupportedError, match="no streaming cache"):
                model(ids, past_key_values=past)


def test_positions_that_skip_are_refused() -> None:
    model, ids = a_model(), tokens(1, 9)
    with streaming(model) as cache, torch.no_grad(), pytest.raises(UnsupportedError, match="position_ids"):
        model(ids, past_key_values=cache, position_ids=torch.arange(9)[None] * 2)


def test_padding_without_positions_is_refused_and_so_are_dense_masks() -> None:
    model, ids = a_model(), tokens(1, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    with streaming(model) as cache, torch.no_grad():
        with pytest.raises(UnsupportedError, match="cumsum"):
            model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(UnsupportedError, match="2-D padding mask"):
            model(ids, attention_mask=torch.zeros(1, 1, 9, 9), past_key_values=cache.fresh())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda model: nn.Linear(2, 2), "PreTrainedModel"),
        (lambda model: model.train(), "training mode"),
    ],
)
def test_other_models_are_refused(change: Any, match: str) -> None:
    with pytest.raises(AttnoptError, match=match), streaming(change(a_model())):
        pass


def test_gradients_are_refused() -> None:
    model = a_model()
    with streaming(model) as cache, pytest.raises(UnsupportedError, match="no_grad"):
        model(tokens(1, 9), past_key_values=cache)


def test_crops_are_negative_as_transformers_has_them() -> None:
    model = a_model()
    with streaming(model) as cache, torch.no_grad():
        model(tokens(1, 9), past_key_values=cache)
        with pytest.raises(OptionError, match="minus the number"):
            cache.crop(3)


def test_importing_the_caches_does_not_import_transformers() -> None:
    code = "import sys, attnopt.caches; sys.exit('transformers' in sys.modules or 'triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
