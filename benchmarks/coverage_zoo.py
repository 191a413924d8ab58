"""Tiny models with random weights of every architecture that builds from its configuration by one generic rule.

A configuration is shrunk by the names of its fields (hidden sizes, layers, heads, experts, ...); where the result does
not build or run, a few more generic variants are tried, the same for every architecture. Nothing is downloaded.
"""

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

VOCAB, LAYERS = 128, 2
MAX_PARAMETERS = 70_000_000

#: Auto-class mappings of transformers by the family that the benchmark reports.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "causal": ("MODEL_FOR_CAUSAL_LM",),
    "masked": ("MODEL_FOR_MASKED_LM",),
    "seq2seq": ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",),
    "vision": ("MODEL_FOR_IMAGE_CLASSIFICATION", "MODEL_FOR_VIDEO_CLASSIFICATION", "MODEL_FOR_BACKBONE"),
    "audio": ("MODEL_FOR_AUDIO_CLASSIFICATION", "MODEL_FOR_CTC", "MODEL_FOR_SPEECH_SEQ_2_SEQ"),
}

#: What an integer field becomes, by its name; the first pattern that matches decides.
SIZES: Mapping[str, int] = {
    r"vocab|^n_tokens$": VOCAB,
    r"num_kv_shared_layers|num_nextn_predict_layers|num_hash_layers": 0,
    r"first_k_dense|num_dense_layers|moe_layer_start|^n_group$|topk_group|num_expert_group": 1,
    r"^linear_num_key_heads$|^linear_num_value_heads$|^mamba_n_groups$": 4,
    r"kv_heads|key_value_heads|^n_head_kv$|multi_query_groups": 2,
    r"^(mamba_n_heads|mamba_num_heads|ssm_num_heads)$": 8,
    r"^n_mamba_heads$": 2,
    r"(^|_)(num|n)_(\w+_)?heads?$|attention_heads$|^heads$|^num_heads\b": 4,
    r"(hidden|encoder|decoder|num|n|attention|block)_layers?$|^layers$|^depth$|^num_layers\w*$": LAYERS,
    r"experts_per_tok|moe_(topk|top_k|k)$|top_k_experts|^num_selected_experts$": 2,
    r"num_(\w+_)?experts$|n_(\w+_)?experts$|moe_num_experts$|zero_expert_num|expert_num$": 4,
    r"(intermediate|ffn|ffw|feed_forward|dense|mlp)\w*_(size|dim)|_ff(n)?_?dim$|^d_ff$|^dff$|^n_inner$|expert_dim": 96,
    r"^(qk_rope_head_dim|qk_nope_head_dim|rotary_dim)$": 8,
    r"^kv_lora_rank$": 16,
    r"^q_lora_rank$": 24,
    r"^v_head_dim$": 12,
    r"^qk_head_dim$": 16,  # the two above together
    r"head_dim$|^d_kv$|^d_head$|kv_channels|^mamba_d_head$|^ssm_state_size$|^mamba_d_state$|^state_size$": 16,
    r"^index_topk$|^(?!.*tokenizer).*chunk_size$|^context_size$": 8,
    r"sliding_window$|attention_window|local_window|^window_size_left$": 8,
    r"position_embeddings$|^n_positions$|^n_ctx$|_(source|target)_positions$": 64,
    r"max_seq_len|max_sequence_length|block_size$": 64,
    r"^(image|crop)_size$": 128,
    r"^(num_frames|frames_per_clip)$": 4,
    r"^patch_size$": 16,
    r"^num_latents$": 32,
    r"^num_self_attends_per_block$": LAYERS,
    r"codebook_size": 32,
    r"num_codebooks$": 2,
    r"^num_mel_bins$": 16,
    r"(hidden|embed|emb|model|embedding|embd|width|projection|proj)_?(size|dim|dims)(_global)?$": 64,
    r"^(d_model|d_latents|n_embd|dim|width|lru_width)$": 64,
}  # fmt: skip

Rule = Mapping[str, Any]
#: Keys of a rule: the names of the fields that are also set where the default is None; whether tuples become lists.
UNSET, LISTS = "unset", "lists"


@dataclass(frozen=True, slots=True)
class Entry:
    """One architecture: its family, the key of its configuration and the name of its model class."""

    family: str
    name: str
    model: str


def entries(family: str) -> list[Entry]:
    """Every architecture of a family in the installed transformers, each model class once."""
    auto = importlib.import_module("transformers.models.auto.modeling_auto")
    found: dict[str, Entry] = {}
    for mapping in FAMILIES[family]:
        for name, models in getattr(auto, f"{mapping}_MAPPING_NAMES").items():
            for model in models if isinstance(models, tuple | list) else (models,):
                found.setdefault(model, Entry(family, name, model))
    return sorted(found.values(), key=lambda e: (e.name, e.model))


def build(entry: Entry, attention: str, number: int) -> nn.Module:
    """The tiny model by the variant of this number; raises what the library raises, ValueError if it is not tiny."""
    return build_with(entry, attention, variants()[number])


def build_with(entry: Entry, attention: str, rule: Rule, most: int = MAX_PARAMETERS) -> nn.Module:
    """As `build`, by any rule, with at most so many parameters."""
    import transformers

    model_class = getattr(transformers, entry.model)
    with torch.device("meta"):
        blank = model_class._from_config(_config(entry, model_class, rule), attn_implementation=attention)
    size = sum(p.numel() for p in blank.parameters())
    if size > most:
        raise ValueError(f"{size:,} parameters after shrinking")
    torch.manual_seed(0)
    return model_class._from_config(_config(entry, model_class, rule), attn_implementation=attention).float()


def variants() -> list[Rule]:
    """The generic rule and what is tried, in this order, when it does not build or run."""
    base = {**SIZES, UNSET: r"^(head_dim|num_key_value_heads|n_inner|vocab_size)$"}
    return [
        base,
        _changed(base, lambda name, v: 4 if "kv_heads" in name else v),
        _changed(base, lambda name, v: 8 if name.startswith("head_dim") else v),
        _changed(base, lambda name, v: 8 if name.startswith("head_dim") else 4 if "kv_heads" in name else v),
        _changed(base, lambda name, v: 8 if "(num|n)_" in name else v),
        _changed(base, lambda name, v: None if name.startswith("head_dim") else v),
        _changed(
            base, lambda name, v: 1 if "experts_per_tok" in name else 0 if "feed_forward" in name else v
        ),
        _changed(base, lambda name, v: 6 if "layers?" in name else v),
        _changed(
            base,
            lambda name, v: 128 if v == 64 and "embd" in name else 32 if name.startswith("head_dim") else v,
        ),
        _changed(base, lambda name, v: 64 if "image" in name else v),
        _changed(base, lambda name, v: None if "image" in name or "patch" in name else v),
        base | {UNSET: r"head_dim|heads$|experts|topk|hidden_size|intermediate_size"},
        _changed(base, lambda name, v: 8 if name.startswith("head_dim") else 4 if "kv_heads" in name else v)
        | {UNSET: r"head_dim|heads$|experts|topk"},
        _changed(base, lambda name, v: 32 if name.startswith("head_dim") else 4 if "kv_heads" in name else v),
        _changed(base, lambda name, v: v if name != UNSET else None),
        _changed(base, lambda name, v: 1 if "experts_per_tok" in name else v),
        _changed(base, lambda name, v: 1 if "heads" in name and name != UNSET else v),
        {r"_per_layer_input$": 0, **base},
        {**base, LISTS: True},
        {**base, UNSET: r"^(head_dim|num_key_value_heads|indexer_\w+|vocab_size|pad_token_id)$"},
        {k: v for k, v in base.items() if "layers?" in k or "vocab" in k},
        {},
    ]


def _changed(rule: Rule, to: Callable[[str, int], int | None]) -> Rule:
    changed = {name: to(name, value) for name, value in rule.items()}
    return {name: value for name, value in changed.items() if value is not None}


def _config(entry: Entry, model_class: Any, rule: Rule) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[entry.name]
    if model_class.config_class is not None and not issubclass(config_class, model_class.config_class):
        config_class = model_class.config_class
    return shrunk(config_class, rule, decoder=entry.family == "causal")


def shrunk(config_class: Any, rule: Rule, *, decoder: bool) -> Any:
    """The configuration with its sizes set by the rule, in nested configurations as well."""
    given = _fields(config_class(), rule)
    if decoder and hasattr(config_class(), "is_decoder"):
        given["is_decoder"] = True
    return config_class(**given)


def _fields(default: Any, rule: Rule) -> dict[str, Any]:
    given: dict[str, Any] = {}
    named = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    for name, value in named.items():
        if hasattr(value, "to_dict"):
            given[name] = type(value)(**_fields(value, rule))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            given[name] = _number(name, value, rule)
        elif value is None and re.search(rule.get(UNSET, "^$"), name):
            given[name] = _number(name, 1, rule)
        elif value is None and name.startswith("default_") and named.get(f"{name[8:]}s"):
            given[name] = named[f"{name[8:]}s"][0]  # default_language, of `languages`
        elif isinstance(value, tuple) and rule.get(LISTS):
            given[name] = list(value)
    return {k: v for k, v in (given | _layers(named, given)).items() if v is not named.get(k)}


def _number(name: str, value: float, rule: Rule) -> float:
    if name.endswith(("_token_id", "_token_index")):
        return min(value, VOCAB - 1)
    if re.search(r"drop", name) and 0 < value < 1:
        return type(value)(0)
    if type(value) is not int or value <= 0:
        return value
    size = next(
        (size for key, size in rule.items() if key not in (UNSET, LISTS) and re.search(key, name)), value
    )
    return min(value, size) if name.endswith("patch_size") else size


def _layers(named: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of each kind, and at least LAYERS: lists with an entry per layer are cut to it."""
    key = next(
        (k for k in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if type(named.get(k)) is int),
        None,
    )
    if key is None or given.get(key) == named[key]:
        return {}
    kinds = named.get("layer_types")
    count = given.get(key, LAYERS)
    if isinstance(kinds, list) and kinds:
        count = max(count, len(set(kinds)))
    elif isinstance(named.get("block_types"), list | tuple):  # a pattern that repeats
        count = max(count, len(named["block_types"]))
    if "layer_types" in named and kinds is None:
        return {key: count, "layer_types": ["full_attention"] * count}
    lists = {k: v for k, v in named.items() if isinstance(v, list | tuple) and len(v) == named[key]}
    picked = _picked(
        kinds if isinstance(kinds, list) and len(kinds) == named[key] else range(named[key]), count
    )
    return {key: count} | {k: type(v)(v[i] for i in picked) for k, v in lists.items()}


def _picked(kinds: Any, count: int) -> list[int]:
    """Places of the first layer of each kind, filled up with the first ones."""
    first = [i for i, kind in enumerate(kinds) if kind not in list(kinds)[:i]][:count]
    rest = [i for i in range(len(kinds)) if i not in first]
    return sorted(first + rest[: count - len(first)])
