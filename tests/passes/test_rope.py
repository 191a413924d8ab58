"""Rotary positions are read by their law, whatever their spelling; what is none is refused, or computed right."""

import pytest
import torch
from oracle import assert_same
from rope_cases import STREAMING, N, Turned, paper, tensors
from rope_spellings import (
    NEAR_MISSES,
    SPELLINGS,
    Spelling,
    Turn,
    halves,
    in_single_precision,
    rates,
    rotate_half,
)
from torch import Tensor, nn
from torch.fx import Node

import attnopt
from attnopt.passes.rope import Rotation, read_rotation
from attnopt.reading import read
from attnopt.registry import expansions, rules
from attnopt.rule import Reject
from attnopt.shadow import trace


def rotation(model: nn.Module, *inputs: Tensor) -> Rotation | None:
    shadow = trace(torch.export.export(model, inputs).graph_module, expansions())
    (found,) = [f.site for f in read(shadow, rules()) if f.site is not None]
    return read_rotation(shadow, found)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_each_spelling_is_read_exactly(spelling: Spelling) -> None:
    found = rotation(Turned(spelling.turn), *tensors())
    assert found is not None
    assert (found.style, found.width, found.start) == (spelling.style, spelling.width, spelling.start)
    assert found.scaling == (None if spelling.scaling is None else pytest.approx(spelling.scaling))
    assert found.counted
    factor = {"stretched in both": 2, "swapped in both": -1, "backwards in both": -1}.get(spelling.name, 1)
    wanted = rates(torch.ones((), dtype=torch.float64)) * factor
    assert found.frequencies == pytest.approx(wanted[: spelling.width // 2].tolist(), abs=1e-7)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_each_spelling_is_streamed_as_the_paper_says(spelling: Spelling) -> None:
    inputs = tensors()
    program, report = attnopt.rewrite(torch.export.export(Turned(spelling.turn), inputs), STREAMING)
    (site,) = report.sites
    assert (site.verdict, site.kernel, site.exact) == ("rewritten", "streaming", False)
    assert (site.approximation_error or 0.0) > 1e-3
    assert_same(program.module()(*inputs), paper(spelling.turn, *inputs))


@pytest.mark.parametrize("spelling", SPELLINGS[:2] + SPELLINGS[7:8], ids=lambda s: s.name)
def test_gradients_are_those_of_the_paper(spelling: Spelling) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        Turned(spelling.turn), backend="attnopt", options={**STREAMING, "inner": "aot_eager", "strict": True}
    )
    found = []
    for run in (compiled, lambda *x: paper(spelling.turn, *x)):
        inputs = [x.requires_grad_() for x in tensors()]
        run(*inputs).sin().sum().backward()
        found.append([x.grad for x in inputs])
    assert attnopt.reports()[-1].sites[0].kernel == "streaming"
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("turn_q", "turn_k", "reason"), NEAR_MISSES, ids=lambda x: getattr(x, "__name__", None)
)
def test_what_is_almost_a_rotation_is_refused(turn_q: Turn, turn_k: Turn, reason: str) -> None:
    with pytest.raises(Reject, match=reason):
        rotation(Turned(turn_q, turn_k), *tensors())


def test_a_refused_site_stays_exact_and_says_why() -> None:
    _, report = attnopt.rewrite(torch.export.export(Turned(halves, rotate_by_two), tensors()), STREAMING)
    (site,) = report.sites
    assert (site.verdict, site.exact) == ("rewritten", True)
    assert "not cut to sinks and a window: scores depend on more than the distance" in site.reason


def rotate_by_two(x: Tensor, t: Tensor) -> Tensor:
    return halves(x, t * 2)


def test_tables_in_single_precision_beside_half_queries() -> None:
    found = rotation(Turned(in_single_precision), *tensors(dtype=torch.bfloat16))
    assert found is not None
    assert (found.style, found.width) == ("halves", 8)


def test_no_position_at_all_is_read_as_none() -> None:
    assert rotation(Turned(lambda x, _: x * 0.5), *tensors()) is None


def test_positions_that_may_have_entered_before_are_remarked() -> None:
    _, report = attnopt.rewrite(torch.export.export(Turned(lambda x, _: x), tensors()), STREAMING)
    assert not report.sites[0].exact
    assert "no positions were seen, but" in report.sites[0].reason


class Given(nn.Module):
    """Positions and frequencies come in from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rates(torch.ones((), dtype=torch.float64)))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position_ids: Tensor) -> Tensor:
        angle = position_ids[:, None, :, None].to(q.dtype) * self.inv_freq
        angle = torch.cat((angle, angle), -1)
        q, k = (x * angle.cos() + rotate_half(x) * angle.sin() for x in (q, k))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.4)


@pytest.mark.parametrize("first", [0, 100])
def test_positions_that_are_an_input_count_from_anywhere(first: int) -> None:
    inputs = (*tensors(), first + torch.arange(N)[None].expand(2, -1))
    found = rotation(Given(), *inputs)
    assert found is not None
    assert not found.counted
    assert isinstance(found.frequencies, Node)
    program, report = attnopt.rewrite(torch.export.export(Given(), inputs), STREAMING)
    assert report.sites[0].reason == "its positions (position_ids) are an input, and taken to count up by one"
    assert_same(program.module()(*inputs), paper(halves, *inputs[:3]))


class Table(nn.Module):
    """cos and sin are inputs: nothing says how they were made."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k = (x * cos + rotate_half(x) * sin for x in (q, k))
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def test_tables_from_outside_are_refused() -> None:
    with pytest.raises(Reject, match=r"multiplied by (cos|sin), an input of this graph"):
        rotation(Table(), *tensors(), torch.randn(N, 8).double(), torch.randn(N, 8).double())


def test_a_rotation_that_is_written_in_place_is_refused() -> None:
    def in_place(x: Tensor, t: Tensor) -> Tensor:
        out = x.clone()
        out[..., :4] = halves(x, t)[..., :4]
        return out

    with pytest.raises(Reject, match=r"written to in place|positions may enter"):
        rotation(Turned(in_place), *tensors())
