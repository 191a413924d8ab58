"""Names the fused operators of torch that hold attention and much else inside; they are left as they are."""

import torch
from torch.fx import Node

from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow

aten = torch.ops.aten


class FusedRule:
    """Fused operators that contain attention: torch's encoder-layer and multi-head fast paths."""

    name = "fused"
    anchors = frozenset(
        {aten._transformer_encoder_layer_fwd.default, aten._native_multi_head_attention.default}
    )

    def read(self, anchor: Node, shadow: Shadow) -> Site:
        """Always raises Reject: a projection, an attention and more in one operator, which torch fuses itself."""
        del shadow
        raise Reject(
            f"{anchor.target} is one fused operator; with gradients enabled torch spells it out", anchor, 1
        )


RULE = FusedRule()
