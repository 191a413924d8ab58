"""Attention outside transformers: torch.nn, x-transformers, diffusers, linear attention; and decoys, to be left alone.

Each package but torch is optional: what is not installed is named in the result. Random weights, small sizes.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.machinery import ModuleSpec
from typing import Any

import coverage_decoys as decoys
import torch
from coverage_modes import Mode
from coverage_subjects import Prepared, Subject
from torch import Tensor, nn

#: The package that each family needs.
NEEDS: Mapping[str, str] = {
    "torch.nn": "torch", "x-transformers": "x_transformers", "diffusers": "diffusers",
    "linear-attention-transformer": "linear_attention_transformer", "fla": "fla", "decoys": "torch",
}  # fmt: skip
FAMILIES = tuple(NEEDS)
#: Where the packages are, asked once: `hide` may then keep transformers from calling kernels that want a GPU.
FOUND: Mapping[str, ModuleSpec | None] = {
    f: importlib.util.find_spec(package) for f, package in NEEDS.items()
}

Make = Callable[[], tuple[nn.Module, dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Made:
    """Prepares what `make` returns, whatever the mode: these models choose their spelling themselves."""

    make: Make

    def __call__(self, _: Mode) -> Prepared:
        """The model in fp32."""
        torch.manual_seed(0)
        model, inputs = self.make()
        return Prepared(model.eval(), inputs)


def subjects(family: str) -> list[Subject]:
    """The subjects of a family; none if its package is not installed."""
    if FOUND[family] is None:
        return []
    makers = {
        "torch.nn": _torch_nn, "x-transformers": _x_transformers, "diffusers": _diffusers,
        "linear-attention-transformer": _linear_attention_transformer, "fla": _fla, "decoys": _decoys,
    }  # fmt: skip
    return [Subject(family, name, Made(make)) for name, make in makers[family]().items()]


def left_out() -> dict[str, str]:
    """Families that cannot be measured here, and why."""
    return {f: f"{package} is not installed" for f, package in NEEDS.items() if FOUND[f] is None}


def hide() -> None:
    """From here on transformers takes its own PyTorch code, as on a machine without these packages."""
    for package in ("fla", "mamba_ssm", "causal_conv1d"):
        sys.modules[package] = None  # type: ignore[assignment]


def warm() -> Subject:
    """Something small to start the compilers with."""
    return Subject("torch.nn", "warm", Made(partial(_attention, need_weights=False)))


class Called(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, **inputs: Tensor) -> Any:
        """Calls the function."""
        return self.function(**inputs)


# --- torch.nn ---


def _torch_nn() -> dict[str, Make]:
    kinds = {
        "self": {},
        "weights": {"need_weights": True},
        "padded": {"padded": True},
        "causal": {"causal": True},
    }
    layers = {
        f"TransformerEncoder {kind}": partial(_encoder, kind)
        for kind in ("plain", "norm first", "padded", "causal")
    }
    return {
        **{f"MultiheadAttention {name}": partial(_attention, **options) for name, options in kinds.items()},
        "MultiheadAttention cross": _cross,
        **layers,
        "TransformerDecoder causal": _decoder,
        "Transformer": _transformer,
    }


def _x(length: int = 20, width: int = 64) -> Tensor:
    return torch.randn(2, length, width)


def _ids(length: int) -> Tensor:
    return torch.randint(0, 128, (2, length))


def _keep_out(length: int = 20) -> Tensor:
    return torch.arange(length)[None] < torch.tensor([[0], [3]])


def _causal(length: int = 20) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


def _attention(
    *, need_weights: bool = False, padded: bool = False, causal: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    x = _x()
    options: dict[str, Any] = {"need_weights": need_weights}
    if padded:
        options["key_padding_mask"] = _keep_out()
    if causal:
        options |= {"attn_mask": _causal(), "is_causal": True}
    return nn.MultiheadAttention(64, 4, batch_first=True), {"query": x, "key": x, "value": x, **options}


def _cross() -> tuple[nn.Module, dict[str, Any]]:
    held = {"query": _x(), "key": _x(15, 48), "value": _x(15, 40), "need_weights": False}
    return nn.MultiheadAttention(64, 4, batch_first=True, kdim=48, vdim=40), held


def _encoder(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    layer = nn.TransformerEncoderLayer(
        64, 4, 96, dropout=0.0, batch_first=True, norm_first=kind == "norm first"
    )
    masks = {
        "padded": {"src_key_padding_mask": _keep_out()},
        "causal": {"mask": _causal(), "is_causal": True},
    }
    return nn.TransformerEncoder(layer, 2), {"src": _x(), **masks.get(kind, {})}


def _decoder() -> tuple[nn.Module, dict[str, Any]]:
    layer = nn.TransformerDecoderLayer(64, 4, 96, dropout=0.0, batch_first=True)
    held = {"tgt": _x(), "memory": _x(15), "tgt_mask": _causal(), "tgt_is_causal": True}
    return nn.TransformerDecoder(layer, 2), held


def _transformer() -> tuple[nn.Module, dict[str, Any]]:
    model = nn.Transformer(64, 4, 2, 2, 96, dropout=0.0, batch_first=True)
    return model, {"src": _x(15), "tgt": _x(), "tgt_mask": _causal(), "tgt_is_causal": True}


# --- x-transformers ---


def _x_transformers() -> dict[str, Make]:
    options: dict[str, dict[str, Any]] = {
        "plain": {}, "flash": {"attn_flash": True}, "rotary": {"rotary_pos_emb": True},
        "alibi": {"alibi_pos_bias": True}, "relative bias": {"rel_pos_bias": True}, "grouped": {"attn_kv_heads": 2},
        "one kv head": {"attn_one_kv_head": True}, "normed queries": {"attn_qk_norm": True},
        "soft cap": {"attn_softclamp_logits": True, "attn_logit_softclamp_value": 30.0},
        "sparse": {"attn_sparse_topk": 4}, "gated values": {"attn_gate_values": True},
        "talking heads": {"attn_pre_talking_heads": True, "attn_post_talking_heads": True},
        "memory keys": {"attn_num_mem_kv": 4}, "head scale": {"attn_head_scale": True},
        "sink": {"attn_add_zero_kv": True},
    }  # fmt: skip
    decoders = {f"decoder {name}": partial(_x_decoder, given) for name, given in options.items()}
    return {**decoders, "encoder": _x_encoder, "encoder and decoder": _x_both}


def _x_decoder(options: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    return _wrapped("Decoder", **options), {"x": _ids(20)}


def _x_encoder() -> tuple[nn.Module, dict[str, Any]]:
    return _wrapped("Encoder"), {"x": _ids(20), "mask": ~_keep_out()}


def _x_both() -> tuple[nn.Module, dict[str, Any]]:
    return _wrapped("Decoder", cross_attend=True), {"x": _ids(20), "context": _x(15)}


def _wrapped(kind: str, **options: object) -> nn.Module:
    import x_transformers

    layers = getattr(x_transformers, kind)(dim=64, depth=2, heads=4, attn_dim_head=16, **options)
    return x_transformers.TransformerWrapper(num_tokens=128, max_seq_len=64, attn_layers=layers)


# --- diffusers ---


def _diffusers() -> dict[str, Make]:
    return {
        f"{model} {processor}": partial(_diffused, model, processor)
        for model in ("DiTTransformer2DModel", "UNet2DConditionModel", "Transformer2DModel")
        for processor in ("AttnProcessor", "AttnProcessor2_0")
    }


def _diffused(name: str, processor: str) -> tuple[nn.Module, dict[str, Any]]:
    import diffusers
    from diffusers.models import attention_processor

    image, step, context = torch.randn(2, 4, 8, 8), torch.tensor([3, 5]), _x(7, 32)
    sizes = dict(num_attention_heads=4, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8)
    match name:
        case "DiTTransformer2DModel":
            model = diffusers.DiTTransformer2DModel(
                **sizes, out_channels=4, patch_size=2, num_embeds_ada_norm=8
            )
            held = {"hidden_states": image, "timestep": step, "class_labels": torch.tensor([1, 2])}
        case "Transformer2DModel":
            model = diffusers.Transformer2DModel(**sizes, cross_attention_dim=32, norm_num_groups=2)
            held = {"hidden_states": image, "encoder_hidden_states": context}
        case _:
            model = diffusers.UNet2DConditionModel(
                sample_size=8, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=32,
                attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            )  # fmt: skip
            held = {"sample": image, "timestep": step, "encoder_hidden_states": context}
    for block in model.modules():
        if isinstance(block, attention_processor.Attention):
            block.set_processor(getattr(attention_processor, processor)())
    return model, {**held, "return_dict": False}


# --- linear attention ---


def _linear_attention_transformer() -> dict[str, Make]:
    return {name: partial(_linear_transformer, causal=name == "causal") for name in ("causal", "encoder")}


def _linear_transformer(*, causal: bool) -> tuple[nn.Module, dict[str, Any]]:
    from linear_attention_transformer import LinearAttentionTransformerLM

    model = LinearAttentionTransformerLM(
        num_tokens=128, dim=64, heads=4, depth=2, max_seq_len=64, causal=causal, blindspot_size=1, dim_head=16
    )
    return model, {"x": _ids(64)}


def _fla() -> dict[str, Make]:
    linear, gated, retention = (
        _file(f"fla.ops.{name}.naive") for name in ("linear_attn", "simple_gla", "retention")
    )
    q, k, v = (torch.randn(2, 64, 4, 16) for _ in range(3))
    plain, decayed = {"q": q, "k": k, "v": v}, {"q": q, "k": k, "v": v, "g": -torch.rand(2, 64, 4)}
    found = {
        "naive_chunk_linear_attn": (linear, plain), "naive_recurrent_linear_attn": (linear, plain),
        "naive_chunk_simple_gla": (gated, decayed), "naive_recurrent_simple_gla": (gated, decayed),
        "naive_parallel_simple_gla": (gated, decayed), "naive_retention": (retention, plain),
    }  # fmt: skip
    return {
        name: partial(_function, getattr(module, name), inputs)
        for name, (module, inputs) in found.items()
        if hasattr(module, name)
    }


def _file(name: str) -> Any:
    """A module of a package by its file, without the package around it, which wants a GPU."""
    package, *inner = name.split(".")
    root = (FOUND[package].submodule_search_locations or [""])[0]  # type: ignore[union-attr]
    spec = importlib.util.spec_from_file_location(name.replace(".", "_"), "/".join([root, *inner]) + ".py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules[spec.name] = module  # type: ignore[union-attr]  # Dynamo looks functions up by their module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def _function(function: Callable[..., Any], inputs: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    return Called(function), inputs


# --- decoys ---


def _decoys() -> dict[str, Make]:
    return {name: partial(_decoy, function, make) for name, (function, make) in decoys.DECOYS.items()}


def _decoy(
    function: Callable[..., Any], make: Callable[[], dict[str, Tensor]]
) -> tuple[nn.Module, dict[str, Any]]:
    return Called(function), make()
