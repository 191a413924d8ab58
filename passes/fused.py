"""Torch's fused operators with attention inside, spelled out, so that the attention in them can be read.

An expansion is the operator in plain torch operations. The shadow is traced through it; where the site inside is
rewritten, the original node gives way to what its expansion traced, and everywhere else it stays as it was.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow

aten = torch.ops.aten


class FusedRule:
    """Fused operators that were not spelled out, such as those on nested tensors."""

    name = "fused"
    anchors = frozenset(
        {aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default}
    )

    def read(self, anchor: Node, shadow: Shadow) -> Site:
        """Always raises Reject: a projection, an attention and more in one operator."""
        del shadow
        raise Reject(
            f"{anchor.target} is one fused operator on tensors that attnopt does not read (nested, or of other than "
            "three dimensions); with gradients enabled torch spells it out",
            anchor,
            1,
        )


def encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,  # noqa: FBT001 - the operator's own signature
    norm_first: bool,  # noqa: FBT001
    eps: float,
    *rest: Any,
) -> Tensor:
    """torch._transformer_encoder_layer_fwd: attention and a feed-forward network, each with its norm and residual."""
    first_norm, second_norm, widen, narrow = (rest[n : n + 2] for n in (0, 2, 4, 6))
    mask, mask_type = (*rest[8:], None, None)[:2]

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.layer_norm(x, (embed_dim,), weight, bias, eps)

    x = norm(src, *first_norm) if norm_first else src
    attended, _ = multi_head_attention(
        x, x, x, embed_dim, num_heads, qkv_weight, qkv_bias, proj_weight, proj_bias, mask,
        need_weights=False, mask_type=mask_type,
    )  # fmt: skip
    x = src + attended
    x = x if norm_first else norm(x, *first_norm)
    inner = functional.linear(norm(x, *second_norm) if norm_first else x, *widen)
    inner = functional.gelu(inner) if use_gelu else functional.relu(inner)
    x = x + functional.linear(inner, *narrow)
    return x if norm_first else norm(x, *second_norm)


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_head: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,  # noqa: FBT001, FBT002 - the operator's own signature
    average_attn_weights: bool = True,  # noqa: FBT001, FBT002
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """torch._native_multi_head_attention of three (B, S, E): the output (B, Sq, E), and the weights if wanted."""
    projected = zip((query, key, value), qkv_weight.chunk(3), qkv_bias.chunk(3), strict=True)
    q, k, v = (
        functional.linear(x, w, b).unflatten(-1, (num_head, embed_dim // num_head)).transpose(1, 2)
        for x, w, b in projected
    )
    scores = (q * (embed_dim // num_head) ** -0.5) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(_hidden(mask, mask_type), float("-inf"))
    weights = scores.softmax(-1)
    out = functional.linear((weights @ v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights else weights


def _hidden(mask: Tensor, mask_type: int | None) -> Tensor:
    """The mask over (B, H, Sq, Sk), True where hidden: type 0 is (Sq, Sk), 1 is (B, Sk), 2 has four dimensions."""
    hidden = mask if mask.dtype == torch.bool else mask != 0
    return hidden[:, None, None, :] if mask_type == 1 else hidden


def _is_plain(*args: Any, **kwargs: Any) -> bool:
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
    return tensors[0].dim() == 3 and not any(x.is_nested for x in tensors)


#: Operator, as Dynamo and as ATen name it -> when it may be spelled out, and how.
EXPANSIONS = {
    torch._transformer_encoder_layer_fwd: (_is_plain, encoder_layer),
    aten._transformer_encoder_layer_fwd.default: (_is_plain, encoder_layer),
    torch._native_multi_head_attention: (_is_plain, multi_head_attention),
    aten._native_multi_head_attention.default: (_is_plain, multi_head_attention),
}

RULE = FusedRule()
