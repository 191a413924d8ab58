"""Laws of torch's fused operators: their attention is reported as refused, never missed, and they run as they are."""

import pytest
import torch
from compiling import compiled, reports_after
from graphs import nodes_of, reject_of, shadow_of

import attnopt
from attnopt.passes.fused import RULE
from attnopt.rule import Reject

E, S = 16, 6
LAYER = torch.ops.aten._transformer_encoder_layer_fwd.default
HEADS = torch.ops.aten._native_multi_head_attention.default


def encoder_layer():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(E, 4, 32, batch_first=True).eval()
    return layer.requires_grad_(False)


def multi_head(x, weight, bias, out_weight, out_bias):
    return torch._native_multi_head_attention(
        x, x, x, E, 4, weight, bias, out_weight, out_bias, need_weights=False
    )[0]


def multi_head_inputs():
    shapes = (2, S, E), (3 * E, E), (3 * E,), (E, E), (E,)
    return [torch.randn(shape) for shape in shapes]


def test_the_rule_starts_at_both_fused_operators():
    assert RULE.anchors == {LAYER, HEADS}


def test_fused_multi_head_attention_is_refused_by_name():
    with torch.no_grad():
        reject = reject_of(multi_head, *multi_head_inputs())
    assert "_native_multi_head_attention" in reject.reason
    assert (reject.depth, reject.node.target) == (1, HEADS)


def test_every_fused_node_is_refused():
    with torch.no_grad():
        shadow = shadow_of(multi_head, *multi_head_inputs())
    (node,) = nodes_of(shadow.module, HEADS)
    with pytest.raises(Reject, match="one fused operator"):
        RULE.read(node, shadow)


def report_of(layer):
    """What attnopt says of a layer, whose output must be eager's."""
    before, x = attnopt.reports(), torch.randn(2, S, E)
    torch.testing.assert_close(compiled(layer)(x), layer(x))
    return reports_after(before)


def test_an_encoder_layer_without_gradients_is_reported_as_refused():
    with torch.no_grad():
        (site,) = report_of(encoder_layer()).attention
    assert (site.verdict, site.nearest_rule) == ("refused", "fused")
    assert "_transformer_encoder_layer_fwd" in site.reason


def test_an_encoder_layer_with_gradients_is_read():
    (site,) = report_of(encoder_layer().requires_grad_()).attention
    assert site.verdict in ("rewritten", "kept"), site.reason
