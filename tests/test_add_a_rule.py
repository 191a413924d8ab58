"""How to add a rule, from beginning to end: one file, no list to edit.

The file reads a softmax to the base of two, which attnopt does not know by itself. It says how this softmax is spelled
(a `Form`); the scores above and the values below are read by what is there. It lies in a folder of its own that becomes
part of `attnopt.passes`, as a contributor's file would.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from compiling import check_like_eager
from torch import Tensor

import attnopt.passes
from attnopt.registry import rules

THE_FILE = '''
"""Reads 2^(s - max(s)) / its sum, the softmax to the base of two, and the product with the values after it."""

from math import log

import torch
from torch.fx import Node

from attnopt.passes.layout import Space, input_node
from attnopt.passes.sizes import shape_of
from attnopt.passes.softmax import site_around
from attnopt.passes.softmax_form import Form
from attnopt.passes.softmax_nodes import between
from attnopt.passes.softmax_sinks import without_maximum
from attnopt.rule import Reject, Site
from attnopt.shadow import Shadow

aten = torch.ops.aten


class BaseTwoRule:
    """Softmax attention whose weights are powers of two."""

    name = "base-two"
    anchors = frozenset({aten.div.Tensor})

    def read(self, anchor: Node, shadow: Shadow) -> Site:
        """The site around one division. Raises Reject, with depth -1 where it divides something else."""
        power = power_of_two(anchor)
        space = Space()
        dims = tuple(space.fresh(size) for size in shape_of(anchor))
        shifted = input_node(power)
        scores = without_maximum(space, shifted, dims, dims[-1])
        if scores is None:
            raise Reject("what is subtracted is not the maximum of the row", shifted)
        inner = between(shadow, scores, anchor)
        return site_around(self.name, Form(space, anchor, scores, dims, dims[-1], inner, scale=log(2)), shadow)


def power_of_two(division: Node) -> Node:
    """The node of 2^x, for a division of it by its own sum over the rows."""
    top, bottom = division.args
    own_sum = isinstance(bottom, Node) and bottom.target == aten.sum.dim_IntList
    if not own_sum or bottom.args[:3] != (top, [-1], True) or top.target != aten.exp2.default:
        raise Reject("not a power of two over its own sum", division, depth=-1)
    return top


RULE = BaseTwoRule()
'''


@pytest.fixture
def with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The contributor's file in place; afterwards everything is as before."""
    (tmp_path / "base_two.py").write_text(THE_FILE)
    monkeypatch.setattr(attnopt.passes, "__path__", [*attnopt.passes.__path__, str(tmp_path)])
    rules.cache_clear()
    yield
    rules.cache_clear()


def base_two(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * 0.25
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def by_another_maximum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-1, -2) * 0.25
    weights = torch.exp2(scores - scores.amax(-2, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


def inputs() -> list[Tensor]:
    return [torch.randn(2, 4, 8, 16) for _ in range(3)]


def test_the_file_is_found_and_listed(with_the_file: None) -> None:
    assert "base-two" in [rule.name for rule in rules()]


def test_its_spelling_is_rewritten_and_computes_what_eager_computes(with_the_file: None) -> None:
    (site,) = check_like_eager(base_two, inputs(), differentiable=3).attention
    assert (site.verdict, site.nearest_rule, site.spec) == (
        "rewritten",
        "base-two",
        "softmax scale=0.173287 full",
    )


def test_its_near_miss_is_left_alone(with_the_file: None) -> None:
    report = check_like_eager(by_another_maximum, inputs())
    assert report.having("rewritten") == ()
    assert "not the maximum of the row" in report.sites[0].reason


def test_without_the_file_the_spelling_is_left_alone() -> None:
    assert check_like_eager(base_two, inputs()).having("rewritten") == ()
