"""The call takes the root's place, and everything else in the graph stays as it was."""

from collections.abc import Callable

import pytest
import torch
from compiling import check_like_eager
from graphs import aten_graph, nodes_of
from torch import Tensor
from torch.fx import GraphModule, Node

from attnopt.options import Options
from attnopt.pipeline import optimise

aten = torch.ops.aten
Q, K, V = torch.randn(3, 2, 3, 7, 4).unbind()
KEEP = torch.rand(2, 1, 7, 7) < 0.8


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v


def rewritten(module: GraphModule) -> None:
    """Rewrites the module in place."""
    verdicts = {site.verdict for site in optimise(module, Options(), gradient=False).sites}
    assert verdicts == {"rewritten"}


def test_a_view_of_the_output_still_runs() -> None:
    def viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v).view(2, 3 * 7, 4)

    inputs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (Q, K, V)]
    (site,) = check_like_eager(viewed, inputs, differentiable=3).attention
    assert site.verdict == "rewritten"


def test_two_sites_share_a_mask_that_is_also_returned() -> None:
    def layers(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        hidden = keep.logical_not()
        out = v
        for _ in range(2):
            out = (q @ k.transpose(-2, -1)).masked_fill(hidden, -1e30).softmax(-1) @ out.sin()
        return out, hidden

    report = check_like_eager(layers, (Q, K, V, KEEP), differentiable=3)
    assert [site.verdict for site in report.attention] == ["rewritten"] * 2


def test_nothing_else_in_the_graph_changes() -> None:
    def beside(q: Tensor, k: Tensor, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        before = x.sin().exp()
        out = attend(q, k, v)
        return before.cos() + x, out.tanh()

    module = aten_graph(beside, Q, K, V, torch.randn(5))
    others = [n for n in module.graph.nodes if n.op == "placeholder" or n.target in BESIDE]
    held = [(n, n.target, n.args) for n in others]
    rewritten(module)
    kept: list[Node] = [n for n in module.graph.nodes if n in others]
    assert [(n, n.target, n.args) for n in kept] == held
    assert nodes_of(module, aten.softmax.int) == nodes_of(module, aten._softmax.default) == []
    (last,) = nodes_of(module, aten.tanh.default)
    assert last.args[0] in module.graph.nodes


BESIDE = {aten.sin.default, aten.exp.default, aten.cos.default, aten.add.Tensor}


def test_writes_of_others_are_kept_and_stay_in_order() -> None:
    def counting(q: Tensor, k: Tensor, v: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        out = attend(q, k, v)
        count.mul_(2)
        return out

    module = aten_graph(counting, Q, K, V, torch.zeros(1))
    rewritten(module)
    count = torch.zeros(1)
    torch.testing.assert_close(module(Q, K, V, count), attend(Q, K, V))
    assert count.item() == 2.0


def test_writes_that_belong_to_the_site_go_with_it() -> None:
    def overwriting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1)
        scores.mul_(0.5)
        return scores.softmax(-1) @ v

    module = aten_graph(overwriting, Q, K, V)
    rewritten(module)
    assert nodes_of(module, aten.mul_.Tensor) == nodes_of(module, aten.matmul.default) == []
    torch.testing.assert_close(module(Q, K, V), overwriting(Q, K, V))


def doubled(out: Tensor) -> None:
    out.mul_(2)


def added_to(out: Tensor) -> None:
    out += 1.0


def negated_in_part(out: Tensor) -> None:
    out[..., 0].neg_()


def doubled_through_a_view(out: Tensor) -> None:
    out.transpose(1, 2).mul_(2)


@pytest.mark.parametrize("write", [doubled, added_to, negated_in_part, doubled_through_a_view])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_the_result_may_be_written_to_although_the_backward_pass_needs_it(
    write: Callable[[Tensor], None], inner: str
) -> None:
    def written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attend(q, k, v)
        write(out)
        return out

    report = check_like_eager(written, (Q, K, V), differentiable=3, inner=inner, allow=("streaming",))
    assert [site.verdict for site in report.attention] == ["rewritten"]
