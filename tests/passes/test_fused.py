"""Laws of torch's fused operators: the attention inside is read through their expansions, or reported as refused."""

import pytest
import torch
from compiling import compiled, reports_after
from graphs import dynamo_graphs, nodes_of, reject_of, shadow_of

import attnopt
from attnopt.options import Options
from attnopt.passes.fused import RULE, multi_head_attention
from attnopt.pipeline import optimise
from attnopt.rule import Reject

E, S = 16, 6
LAYER = torch.ops.aten._transformer_encoder_layer_fwd.default
HEADS = torch.ops.aten._native_multi_head_attention.default


def encoder_layer(**options):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(E, 4, 32, batch_first=True, **options).eval()
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


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_an_encoder_layer_without_gradients_is_spelled_out_and_rewritten(norm_first, activation):
    layer = encoder_layer(norm_first=norm_first, activation=activation)
    with torch.no_grad():
        (site,) = report_of(layer).attention
    assert site.verdict == "rewritten", site.reason
    assert site.error <= 1e-9


@pytest.mark.parametrize("kind", ["padding", "causal", "both"])
def test_an_expansion_computes_what_the_operator_computes(kind):
    padding = torch.zeros(2, S, dtype=torch.bool)
    padding[0, 4:] = True
    causal = torch.ones(S, S, dtype=torch.bool).triu(1)
    mask, mask_type = {
        "padding": (padding, 1),
        "causal": (causal, 0),
        "both": ((causal | padding[:, None, None]).expand(2, 4, S, S), 2),
    }[kind]
    x, *weights = multi_head_inputs()
    with torch.no_grad():
        wanted = torch._native_multi_head_attention(x, x, x, E, 4, *weights, mask=mask, mask_type=mask_type)
    got = multi_head_attention(x, x, x, E, 4, *weights, mask=mask, mask_type=mask_type)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_the_operator_gives_way_to_its_expansion_layer_by_layer():
    encoder = (
        torch.nn.TransformerEncoder(encoder_layer(), 3, enable_nested_tensor=False)
        .eval()
        .requires_grad_(False)
    )
    with torch.no_grad():
        (module,) = dynamo_graphs(encoder, torch.randn(2, S, E))
        outcome = optimise(module, Options(), gradient=False)
    assert [site.verdict for site in outcome.sites] == ["rewritten"] * 3
    assert nodes_of(module, torch._transformer_encoder_layer_fwd) == []


def test_weights_that_are_averaged_and_returned_leave_the_operator_as_it_is():
    def both(x, *weights):
        return torch._native_multi_head_attention(x, x, x, E, 4, *weights)

    with torch.no_grad():
        before = attnopt.reports()
        compiled(both)(*multi_head_inputs())
    (site,) = reports_after(before).attention
    assert site.verdict == "kept"
    assert "so they must be computed anyway" in site.reason


def test_an_encoder_layer_with_gradients_is_read():
    (site,) = report_of(encoder_layer().requires_grad_()).attention
    assert site.verdict in ("rewritten", "kept"), site.reason
