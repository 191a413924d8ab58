"""What a person reads: sections apart, equal sites once, the line, the reason, and what would help."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import attnopt
from attnopt.errors import StrictError
from attnopt.report import Report, SiteReport
from attnopt.report_groups import group, short_node
from attnopt.report_text import NARROWEST, render
from attnopt.wording import advised

LAYERS = tuple(
    SiteReport(
        family="softmax",
        verdict="refused",
        where="model.py:41",
        module=f"layers.{layer}.attention",
        code="weights = torch.softmax(scores.sin(), -1)",
        reason=f"an inner value of the attention (softmax_{layer}) is also used by linear_{4 * layer + 3}",
        nearest_rule="softmax",
        node=f"%softmax_{layer} : [num_users=2] = call_function[target=torch.ops.aten.softmax.int]"
        f"(args = (%matmul_{layer}, -1), kwargs = {{}})",
    )
    for layer in range(30)
)
KEPT = replace(
    LAYERS[0], verdict="kept", reason="it is the best there is", spec="softmax scale=1 full", kernel="sdpa"
)
ROUTER = replace(
    LAYERS[0], verdict="rejected", family="other", code="top = softmax(logits, -1)", module="layers.0.gate"
)
DONE = replace(
    LAYERS[0], verdict="rewritten", reason="", error=0.0, kernel="sdpa", spec="softmax scale=1 causal"
)


def test_thirty_layers_with_one_reason_are_one_paragraph() -> None:
    assert len(group(LAYERS)) == 1
    assert render(Report(sites=tuple(map(advised, LAYERS)))) == (
        "left alone: 30 sites\n" + "-" * 100 + "\n"
        "30x  model.py:41  layers.{0-29}.attention\n"
        "     weights = torch.softmax(scores.sin(), -1)\n"
        "     refused: an inner value of the attention (softmax_0) is also used by linear_3\n"
        "     what would help: do not return or reuse what lies inside (output_attentions=False), or compute\n"
        "       it apart\n"
        "     nearest rule: softmax; stopped at: softmax_0 = aten.softmax.int(matmul_0, -1)\n\n"
        "0 of 30 attention sites rewritten (0 exact, 0 approximate); 0 graph breaks; 0.0 s"
    )


def test_what_became_of_sites_is_told_apart() -> None:
    text = render(Report(sites=(ROUTER, KEPT, DONE, *LAYERS)))
    titles = [
        "attention site",
        "kept as they are: 1 site",
        "left alone: 30 sites",
        "looked like attention and is not:",
    ]
    places = [text.index(title) for title in titles]
    assert places == sorted(places)


def test_decoys_are_no_failures() -> None:
    text = render(Report(sites=(ROUTER, ROUTER)))
    assert "  2x model.py:41  layers.0.gate: top = softmax(logits, -1)\n" in text
    assert not {"refused", "left alone", "help"} & {*text.replace(":", " ").split()}


@given(st.integers(0, 200))
def test_every_width_is_kept(width: int) -> None:
    long = replace(LAYERS[0], where=f"{'x' * 90}.py:1", module="y" * 150, code="z" * 300)
    text = render(
        Report(sites=(long, KEPT, ROUTER, replace(DONE, module="w" * 200)), graph_breaks=("g" * 99,)), width
    )
    assert max(map(len, text.split("\n"))) <= max(width, NARROWEST)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        ({"reason": "dropout 0.1 on the attention weights"}, "call model.eval(), or set the dropout"),
        (
            {"reason": "q is written to in place before the attention uses it"},
            "write the result to a new tensor",
        ),
        ({"reason": "a size depends on data"}, "give it a fixed size"),
        (
            {"reason": "aten.sin between Q K^T and the softmax is not understood"},
            "scaled_dot_product_attention here",
        ),
        ({"reason": "not understood", "family": "linear"}, "attnopt.ops.lightning_attention here"),
        ({"reason": "masked scores become -5; fill with -inf"}, ""),
        ({"reason": "sdpa: does not honour softcap", "spec": "softmax"}, "allow more kernels"),
        ({"reason": "anything", "verdict": "rejected"}, ""),
        ({"reason": "anything", "verdict": "rewritten"}, ""),
    ],
)
def test_advice_fits_the_reason(change: dict[str, object], advice: str) -> None:
    given_ = advised(replace(LAYERS[0], **change)).advice
    assert advice in given_ if advice else not given_


def test_a_disagreeing_check_is_not_told_as_a_missing_kernel() -> None:
    wrong = replace(
        LAYERS[0], spec="softmax scale=1 full", reason="the reading differs by 1.0 from the graph", error=1.0
    )
    text = render(Report(sites=(advised(wrong),)))
    assert "refused: the check disagreed: the reading differs" in text
    assert "please report it" in text
    assert "read as: softmax scale=1 full" in text
    unserved = replace(wrong, error=None, reason="sdpa: does not honour softcap")
    assert "refused: it was read, but no kernel serves it: sdpa:" in render(Report(sites=(unserved,)))


@pytest.mark.parametrize(
    ("node", "short"),
    [
        (LAYERS[3].node, "softmax_3 = aten.softmax.int(matmul_3, -1)"),
        (
            "%x : [num_users=1] = call_function[target=torch.ops.aten.sin.default](args = (%a,), kwargs = {})",
            "x = aten.sin.default(a)",
        ),
        ("%x : [num_users=0] = placeholder[target=x]", "%x : [num_users=0] = placeholder[target=x]"),
        ("", ""),
    ],
)
def test_a_node_is_told_without_ceremony(node: str, short: str) -> None:
    assert short_node(node) == short


def test_strict_says_what_the_report_says() -> None:
    import torch

    def odd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.softmax((q @ k.mT).cumsum(-1).tan(), -1) @ v

    inputs = torch.randn(3, 1, 2, 6, 4).unbind()
    (site,) = attnopt.explain(odd, *inputs).attention
    with pytest.raises(StrictError) as caught:
        attnopt.explain(odd, *inputs, options={"strict": True})
    for part in (site.where, site.code, site.reason, site.advice, short_node(site.node)):
        assert part
        assert part in str(caught.value)
