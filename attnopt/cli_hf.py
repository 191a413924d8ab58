"""Hugging Face models as SOURCE: a folder with config.json, with or without weights; nothing is downloaded."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.errors import Blame, MissingError, SourceError, UnsafeFileError

_TOKENS = 64
_BYTES = 4  # of a parameter in float32


class Logits(nn.Module):
    """A causal language model as a function of its tokens: (B, S) int64 to (B, S, vocabulary)."""

    def __init__(self, language_model: nn.Module) -> None:
        super().__init__()
        self.language_model = language_model

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.language_model(input_ids, use_cache=False).logits
        return logits


def from_folder(
    folder: Path,
) -> tuple[nn.Module, tuple[Tensor], Mapping[str, Any], tuple[Path, ...], tuple[str, ...]]:
    """The causal language model of `folder` in float32, with random tokens as its input: the fields of a Source.

    Weights: model*.safetensors, or one .gguf; none: random ones. Attention is eager, so that it is in the graph.
    Raises SourceError, UnsafeFileError for pickled weights, MissingError without transformers.
    """
    if not (folder / "config.json").is_file() and not _gguf(folder):
        raise SourceError(f"{folder}: there is no config.json; wanted a Hugging Face model folder")
    transformers = _transformers()
    notes: tuple[str, ...] = ()
    if _gguf(folder) or list(folder.glob("*.safetensors")):
        model = _with_weights(transformers, folder)
    else:
        _refuse_pickles(folder)
        model, notes = _random(transformers, folder), (f"{folder} has no weights: they are random",)
    ids = torch.randint(
        0, model.config.vocab_size, (1, _tokens(model.config)), generator=torch.Generator().manual_seed(0)
    )
    used = tuple(path for path in folder.iterdir() if path.is_file())
    return Logits(model.eval()).eval(), (ids,), {}, used, notes


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer that lies beside a model; SourceError if transformers cannot load it."""
    transformers = _transformers()
    found = _gguf(folder)
    from_gguf = {"gguf_file": found[0].name} if found and not list(folder.glob("tokenizer*")) else {}
    with Blame(f"loading the tokenizer of {folder}", "say --tokenizer, or give token ids as .json"):
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **from_gguf
        )


def _transformers() -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise MissingError("Hugging Face models need transformers; pip install 'attnopt[hf]'") from error
    return transformers


def _gguf(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.gguf"))


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind))
    if pickles:
        raise UnsafeFileError(
            f"will not load {folder}: its weights are pickles ({pickles[0]}), which run the code inside them; "
            "convert them to safetensors"
        )


def _with_weights(transformers: Any, folder: Path) -> Any:
    found = _gguf(folder)
    from_gguf = {"gguf_file": found[0].name} if found and not list(folder.glob("*.safetensors")) else {}
    with Blame(f"loading {folder} with transformers", "-v shows its traceback"):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True,
            trust_remote_code=False, use_safetensors=True, **from_gguf,
        )  # fmt: skip


def _random(transformers: Any, folder: Path) -> Any:
    """The model with random weights; first on the meta device, as a small file may describe a giant."""
    with Blame(f"building {folder} with transformers", "only causal language models are built from a config"):
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        build = transformers.AutoModelForCausalLM.from_config
        with torch.device("meta"):
            needed = _BYTES * sum(p.numel() for p in build(config, attn_implementation="eager").parameters())
        if needed > _memory():
            raise SourceError(
                f"{folder}: its weights would take {needed / 1e9:.0f} GB, more than this machine has"
            )
        return build(config, attn_implementation="eager", dtype=torch.float32)


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _tokens(config: Any) -> int:
    return min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
