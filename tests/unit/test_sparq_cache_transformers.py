"""Models of transformers generate over a SparQ cache as the paper's algorithm does, and exactly where all is chosen."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    PreTrainedModel,
    StaticCache,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attnopt import caches
from attnopt.errors import OptionError, ShapeError, UnsupportedError
from attnopt.kernels.sparq.rows import sparq_rows

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
EVERYTHING = {"capacity": 64, "rank": 1, "topk": 64, "local": 2}
LITTLE = {"capacity": 64, "rank": 2, "topk": 6, "local": 2}


def a_model(kind: str = "llama", dtype: torch.dtype = torch.float64, **more: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    config = CONFIG_MAPPING[kind](**{**SMALL, **more})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # from small random numbers every attention is nearly uniform
        for name, weight in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                weight.mul_(8)
    return model.to(dtype)


def tokens(batch: int, n: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 97, (batch, n), generator=torch.Generator().manual_seed(seed))


def padded(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Texts of several lengths, padded on the left, and their mask."""
    longest = max(lengths)
    ids, mask = tokens(len(lengths), longest, seed), torch.ones(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : longest - length] = 0
        mask[row, : longest - length] = 0
    return ids, mask


@torch.no_grad()
def logits(model: PreTrainedModel, cache: Any, ids: Tensor, cuts: tuple[int, ...]) -> Tensor:
    """Of one text, fed in pieces."""
    return torch.cat([model(piece[None], past_key_values=cache).logits[0] for piece in ids.split(cuts)])


@torch.no_grad()
def by_rows(model: PreTrainedModel, ids: Tensor, first: int, **choices: Any) -> Tensor:
    """The same from one forward, in which each query from `first` on is a decoding step."""

    def attention(m: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **_: Any) -> Any:
        return sparq_rows(q, k, v, first=first, scale=scaling, **choices).transpose(1, 2), None

    AttentionInterface.register("by_rows", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("by_rows")
    found = model(ids[None], use_cache=False).logits[0]
    model.set_attn_implementation(before)
    return found


# ---- what it computes ----


@pytest.mark.parametrize("keys", ["both", "one"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_a_prompt_is_exact_and_each_token_a_step_of_sparq(kv_heads: int, keys: Any) -> None:
    model, ids = a_model(num_key_value_heads=kv_heads), tokens(1, 30)[0]
    with caches.sparq(model, **LITTLE, keys=keys) as cache:
        found = logits(model, cache, ids, (11, *(1,) * 19))
    wanted = by_rows(model, ids, 11, rank=2, topk=6, local=2)
    assert torch.allclose(found, wanted, atol=1e-9)
    with torch.no_grad():
        assert not torch.allclose(found[11:], model(ids[None]).logits[0, 11:], atol=1e-2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_it_does_so_in_fp32_and_on_the_gpu(device: str) -> None:
    model, ids = a_model(), tokens(1, 30)[0]
    wanted = by_rows(model, ids, 11, rank=8, topk=6, local=2)
    with caches.sparq(model.to(device, torch.float32), capacity=64, rank=8, topk=6, local=2) as cache:
        found = logits(model, cache, ids.to(device), (11, *(1,) * 19)).cpu()
    assert torch.allclose(found.double(), wanted, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "cohere"])
def test_with_all_positions_chosen_generate_gives_the_tokens_of_a_full_cache(kind: str) -> None:
    more = {"n_embd": 32, "n_layer": 2, "n_head": 4} if kind == "gpt2" else {"num_key_value_heads": 2}
    model, (ids, mask) = a_model(kind, **more), padded(12, 5)
    options = {"attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
    wanted = model.generate(ids, **options)
    with caches.sparq(model, **EVERYTHING) as cache:
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), wanted)
        assert cache.counts.starts.tolist() == [0, 7]
        cache.reset()
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), wanted)


def test_a_left_padded_batch_is_each_text_alone() -> None:
    model, (ids, mask) = a_model(num_key_value_heads=4), padded(14, 5)
    options = {"max_new_tokens": 12, "do_sample": False}
    with caches.sparq(model, **LITTLE) as cache:
        both = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        for row, start in ((0, 0), (1, 9)):
            alone = model.generate(ids[row : row + 1, start:], past_key_values=cache.fresh(), **options)
            assert torch.equal(both[row, start:], alone[0])


@pytest.mark.parametrize("lengths", [(6, 6), (9, 4)])
def test_beams_are_those_of_a_full_cache(lengths: tuple[int, ...]) -> None:
    model, (ids, mask) = a_model(), padded(*lengths)
    options = {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 9, "do_sample": False}
    wanted = model.generate(ids, **options)
    with caches.sparq(model, **EVERYTHING) as cache:
        assert torch.equal(model.generate(ids, past_key_values=cache, **options), wanted)


@pytest.mark.parametrize("seed", range(2))
def test_assisted_generation_takes_back_what_was_guessed_wrong(seed: int) -> None:
    model, helper, prompt = a_model(), a_model(num_hidden_layers=1), tokens(1, 12, seed)
    options = {"max_new_tokens": 16, "do_sample": False}
    with caches.sparq(model, **EVERYTHING) as cache:
        found = model.generate(prompt, past_key_values=cache, assistant_model=helper, **options)
    assert torch.equal(found, model.generate(prompt, **options))


# ---- what is done to it ----


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.sampled_from(["step", "several", "crop", "reorder", "repeat", "reset"]), max_size=7),
    st.integers(0, 9),
)
def test_any_history_answers_as_a_fresh_cache_with_the_same_tokens(doings: list[str], seed: int) -> None:
    model = a_model(num_hidden_layers=1, num_key_value_heads=4)
    ids, generator = tokens(2, 5, seed), torch.Generator().manual_seed(seed)
    with caches.sparq(model, **LITTLE) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        for doing in doings:
            ids = done(model, cache, ids, doing, generator)
        other = cache.fresh()
        model(ids, past_key_values=other)
        new = tokens(len(ids), 1, seed + 1)
        found, wanted = (model(new, past_key_values=each).logits for each in (cache, other))
    assert torch.allclose(
        found, wanted, atol=1e-5
    )  # running means are held in fp64, positions are turned in fp32


def done(model: PreTrainedModel, cache: Any, ids: Tensor, doing: str, generator: torch.Generator) -> Tensor:
    """Does one thing to the cache, and returns the tokens that it then holds."""
    rows = torch.randint(0, len(ids), (len(ids),), generator=generator)
    match doing:
        case "step" | "several":
            new = torch.randint(2, 97, (len(ids), 1 if doing == "step" else 4), generator=generator)
            model(new, past_key_values=cache)
            return torch.cat([ids, new], 1)
        case "crop" if ids.shape[1] > 3:
            cache.crop(-2)
            return ids[:, :-2]
        case "reorder":
            cache.reorder_cache(rows)
            return ids[rows]
        case "repeat" if len(ids) < 5:
            cache.batch_repeat_interleave(2)
            return ids.repeat_interleave(2, 0)
        case "reset":
            cache.reset()
            model(ids[:, :3], past_key_values=cache)
            return ids[:, :3]
    return ids


def test_a_single_layer_of_history_holds_the_same_keys_and_values_as_a_full_cache() -> None:
    model, ids = a_model(), tokens(1, 9)
    full = DynamicCache(config=model.config)
    with caches.sparq(model, **EVERYTHING) as cache, torch.no_grad():
        logits(model, cache, ids[0], (4, 1, 3, 1))
    with torch.no_grad():
        model(ids, past_key_values=full)
    for mine, theirs in zip(cache.layers, full.layers, strict=True):
        assert torch.allclose(mine.keys[:, :, :9], theirs.keys, atol=1e-9)
        assert torch.equal(mine.cache.k_t, mine.keys.mT)
        assert torch.allclose(mine.cache.v_mean, theirs.values.mean(2), atol=1e-9)


def test_memory_is_stated_and_never_moves() -> None:
    model, ids = a_model(dtype=torch.float32), tokens(2, 40)
    for keys, share in (("both", 1.5), ("one", 1.0)):
        with caches.sparq(model, capacity=256, keys=keys) as cache, torch.no_grad():
            assert cache.memory().total == 0
            model(ids[:, :5], past_key_values=cache)
            held = [x.data_ptr() for layer in cache.layers for x in layer.cache.stored()]
            for n in range(5, 40):
                model(ids[:, n : n + 1], past_key_values=cache)
            cache.crop(-3)
            cache.reorder_cache(torch.tensor([1, 0]))
            assert held == [x.data_ptr() for layer in cache.layers for x in layer.cache.stored()]
        static = StaticCache(config=model.config, max_cache_len=256)
        with torch.no_grad():
            model(ids, past_key_values=static)
        plain = sum(x.nbytes for layer in static.layers for x in (layer.keys, layer.values))
        assert cache.memory().plain == plain
        assert cache.memory().total == pytest.approx(share * plain, rel=0.01)
        assert f"{100 * (share - 1):+.0f}"[:3] in str(cache.memory())


# ---- compiled ----


def test_a_step_compiles_whole_and_once() -> None:
    model, ids = a_model(dtype=torch.float32), tokens(2, 30)
    graphs: list[object] = []

    def count(module: Any, inputs: Any) -> Any:
        graphs.append(module)
        return module

    step = torch.compile(model, backend=count, fullgraph=True)
    with caches.sparq(model, **LITTLE) as cache, torch.no_grad():
        plain = cache.fresh()
        for each in (cache, plain):
            model(ids[:, :9], past_key_values=each)
        for n in range(9, 30):
            new = ids[:, n : n + 1]
            found, wanted = step(new, past_key_values=cache).logits, model(new, past_key_values=plain).logits
            assert torch.allclose(found, wanted, atol=1e-4)
    assert len(graphs) == 1
    assert cache.counts.lengths.tolist() == [30, 30]


def test_generate_compiles_by_itself_and_gives_the_same_tokens() -> None:
    model, (ids, mask) = a_model(dtype=torch.float32), padded(9, 6)
    compiling = CompileConfig(backend="eager", fullgraph=True)
    compiling._compile_all_devices = True  # transformers compiles on a GPU alone, unless told so
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    with caches.sparq(model, **LITTLE) as cache:
        wanted = model.generate(ids, past_key_values=cache.fresh(), **options)
        found = model.generate(ids, past_key_values=cache, compile_config=compiling, **options)
    assert torch.equal(found, wanted)


@pytest.mark.gpu
def test_generate_on_a_gpu_compiles_to_cuda_graphs_and_gives_the_same_tokens() -> None:
    model, (ids, mask) = a_model(dtype=torch.float32).to("cuda"), padded(9, 6)
    options = {"attention_mask": mask.cuda(), "max_new_tokens": 8, "do_sample": False}
    with caches.sparq(model, **LITTLE) as cache:
        wanted = model.generate(ids.cuda(), past_key_values=cache.fresh(), disable_compile=True, **options)
        found = model.generate(ids.cuda(), past_key_values=cache, **options)
    assert torch.equal(found, wanted)


# ---- detached, and refused ----


@pytest.mark.parametrize(
    ("kind", "short"), [("sdpa", 6), ("eager", 9)]
)  # eager itself has NaN where a row is padded
def test_detached_it_is_a_plain_static_cache(kind: str, short: int) -> None:
    model, (ids, mask) = a_model(), padded(9, short)
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(ids, **options)
    with caches.sparq(model, **LITTLE) as cache:
        model.generate(ids, past_key_values=cache, **options)
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation(kind)
    cache.reset()
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), wanted)


def test_the_model_is_as_before_afterwards() -> None:
    model = a_model()
    before = copy.copy(vars(model.model.layers[0].self_attn))
    with caches.sparq(model, **LITTLE), pytest.raises(UnsupportedError, match="attached already"):
        caches.sparq(model, **LITTLE).__enter__()
    assert vars(model.model.layers[0].self_attn).keys() == before.keys()


@pytest.mark.parametrize(
    ("kind", "more", "match"),
    [
        ("mistral", {"sliding_window": 8}, "masks more than the future"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "wanted a model with AttentionInterface|AttentionInterface"),
        ("mamba", {}, "attend through transformers' AttentionInterface|AttentionInterface"),
    ],
)
def test_what_is_no_causal_attention_over_a_cache_is_refused(
    kind: str, more: dict[str, Any], match: str
) -> None:
    model = a_model(kind, torch.float32, **more)
    with (
        torch.no_grad(),
        pytest.raises(UnsupportedError, match=match),
        caches.sparq(model, **LITTLE) as cache,
    ):
        model(tokens(1, 9), past_key_values=cache)


def test_padding_on_the_right_and_in_between_is_refused() -> None:
    model, ids = a_model(), tokens(2, 9)
    for hole in (slice(6, 9), slice(3, 5)):
        mask = torch.ones_like(ids)
        mask[1, hole] = 0
        with (
            caches.sparq(model, **LITTLE) as cache,
            torch.no_grad(),
            pytest.raises(UnsupportedError, match="padding_side='left'"),
        ):
            model(ids, attention_mask=mask, past_key_values=cache)


def test_gaps_in_a_later_turn_are_refused() -> None:
    model, ids = a_model(), tokens(2, 9)
    with caches.sparq(model, **LITTLE) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        mask = torch.ones(2, 12, dtype=torch.long)
        model(ids[:, :3], attention_mask=mask, past_key_values=cache)
        mask = torch.ones(2, 15, dtype=torch.long)
        mask[1, 12] = 0
        with pytest.raises(UnsupportedError, match="no gaps"):
            model(ids[:, :3], attention_mask=mask, past_key_values=cache)


def test_a_compiled_prompt_takes_in_its_padding() -> None:
    model, (ids, mask) = a_model(dtype=torch.float32), padded(9, 6)
    at = (mask.cumsum(-1) - 1).clamp_min(0)
    with caches.sparq(model, **LITTLE) as cache, torch.no_grad():
        model(ids, attention_mask=mask, position_ids=at, past_key_values=cache)  # claims the memory
        wanted = model(ids[:, :1], position_ids=at[:, -1:] + 1, past_key_values=cache).logits
        cache.reset()
        whole = torch.compile(model, backend="eager")
        whole(ids, attention_mask=mask, position_ids=at, past_key_values=cache)
        assert cache.counts.starts.tolist() == [0, 3]
        found = model(ids[:, :1], position_ids=at[:, -1:] + 1, past_key_values=cache).logits
    assert torch.allclose(found, wanted, atol=1e-5)


def test_the_attention_without_its_cache_and_the_cache_without_its_attention_raise() -> None:
    model, ids = a_model(), tokens(1, 9)
    with caches.sparq(model, **LITTLE) as cache, torch.no_grad():
        with pytest.raises(UnsupportedError, match="no SparQ cache"):
            model(ids, past_key_values=DynamicCache(config=model.config))
        model.set_attn_implementation("sdpa")
        with pytest.raises(UnsupportedError, match="attnopt_sparq"):
            model(ids, past_key_values=cache)


def test_what_does_not_fit_is_refused() -> None:
    model, ids = a_model(), tokens(2, 9)
    with pytest.raises(OptionError, match="local is 9; wanted at most topk"):
        caches.sparq(model, capacity=8, topk=8, local=9).__enter__()
    with pytest.raises(OptionError, match="capacity is 0"):
        caches.sparq(model, capacity=0).__enter__()
    with caches.sparq(model, capacity=16) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ShapeError, match="3 rows for a batch of 2"):
            cache.reorder_cache(torch.tensor([0, 1, 0]))
        with pytest.raises(OptionError, match="wanted minus"):
            cache.crop(2)
        with pytest.raises(ShapeError, match="room for 16 positions"):
            model(ids, past_key_values=cache)
    with pytest.raises(OptionError, match="wanted a PreTrainedModel"):
        caches.sparq(nn.Linear(2, 2), capacity=8).__enter__()
