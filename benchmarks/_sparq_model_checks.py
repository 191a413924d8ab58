"""What has to be right before sparq_model_gpu.py takes a time: SparQ beside dense attention and its definition."""

from dataclasses import replace

import torch
from _sparq_model import Choices, Place, Setting, apart, by_head, decoder, dense, filled, sparq, tokens
from torch import Tensor

from attnopt.caches import SparqCache
from attnopt.kernels.sparq import steps
from attnopt.kernels.sparq.request import Request


def check(setting: Setting, device: torch.device, dtype: torch.dtype, choices: Choices) -> dict[str, object]:
    """Dense logits if every position is chosen; else each layer's attention beside its definition in fp64."""
    exact = logits_apart(setting, Place(device, torch.float32), choices)
    rows = torch.cat(attention_apart(setting, Place(device, dtype), choices))
    limit = 2 * torch.finfo(dtype).eps / 2
    right = float((rows <= limit).double().mean())
    return {
        "setting": str(setting),
        "logits_apart": exact,
        "rows": rows.shape[0],
        "median_row": float(rows.median()) / limit,
        "worst_row": float(rows.max()) / limit,
        "rows_right": right,
        # Where two positions are as good but for rounding, either may be chosen.
        "passed": exact <= 2.0**-14 and right >= 0.95,
    }


def logits_apart(setting: Setting, place: Place, choices: Choices) -> float:
    """||a - b|| / ||b|| of the worst row: SparQ that chooses every position, and dense attention; in fp32."""
    model = decoder(setting.sizes, place, setting.context - 1).model
    everything = replace(choices, topk=setting.context)
    ids = tokens(setting, place)
    mine = model(ids, sparq(filled(setting, place, "both"), everything))
    want = model(ids, dense(filled(setting, place, "one"), by_head))
    return float(apart(mine, want).max())


def attention_apart(setting: Setting, place: Place, choices: Choices) -> list[Tensor]:
    """The gap of each row of attention to its definition on the same operands, (B * H,) for each layer."""
    caches, found = filled(setting, place, "both"), []
    attend = sparq(caches, choices)

    def both(q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        out = attend(q, k, v, layer)
        found.append(apart(out, definition(q, caches[layer], choices)).flatten())
        return out

    decoder(setting.sizes, place, setting.context - 1).model(tokens(setting, place), both)
    return found


def definition(q: Tensor, cache: SparqCache, choices: Choices) -> Tensor:
    """SparQ in fp64, by plain torch, over a cache whose last position is the token's."""
    operands = (q.double(), cache.k.double(), cache.v.double(), None, None, None)
    chosen = (choices.rank, choices.topk, choices.local, q.shape[3] ** -0.5, q.shape[1] == cache.k.shape[1])
    return steps.decode(Request(*operands, *chosen))
