"""Small models of transformers, and StreamingLLM token by token over them: what their rewrites have to equal."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

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
